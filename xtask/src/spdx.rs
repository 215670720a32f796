//! Licence expressions as crates state them: `MIT OR Apache-2.0`, `(MIT OR Apache-2.0) AND Unicode-3.0`,
//! `Apache-2.0 WITH LLVM-exception`, and the old `MIT/Apache-2.0`.

/// Whether `expression` can be satisfied with licences out of `allowed`.
pub(crate) fn is_allowed(expression: &str, allowed: &[&str]) -> Result<bool, String> {
    let spaced = expression
        .replace('(', " ( ")
        .replace(')', " ) ")
        .replace('/', " OR ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut parser = Parser {
        words: &words,
        allowed,
    };
    let result = parser.either()?;
    match parser.words {
        [] => Ok(result),
        [word, ..] => Err(format!(
            "{word} is out of place in the licence {expression:?}"
        )),
    }
}

struct Parser<'a> {
    words: &'a [&'a str],
    allowed: &'a [&'a str],
}

impl Parser<'_> {
    fn either(&mut self) -> Result<bool, String> {
        let mut result = self.both()?;
        while self.takes("OR") {
            result |= self.both()?;
        }
        Ok(result)
    }

    fn both(&mut self) -> Result<bool, String> {
        let mut result = self.one()?;
        while self.takes("AND") {
            result &= self.one()?;
        }
        Ok(result)
    }

    fn one(&mut self) -> Result<bool, String> {
        if self.takes("(") {
            let result = self.either()?;
            return if self.takes(")") {
                Ok(result)
            } else {
                Err("a licence lacks a parenthesis".to_owned())
            };
        }
        let mut licence = self.word()?.to_owned();
        if self.takes("WITH") {
            licence = format!("{licence} WITH {}", self.word()?);
        }
        Ok(self.allowed.contains(&licence.as_str()))
    }

    fn word(&mut self) -> Result<&str, String> {
        let (word, rest) = self.words.split_first().ok_or("a licence ends too early")?;
        self.words = rest;
        Ok(word)
    }

    fn takes(&mut self, word: &str) -> bool {
        let is_next = self.words.first() == Some(&word);
        if is_next {
            self.words = &self.words[1..];
        }
        is_next
    }
}

#[cfg(test)]
mod tests {
    //! Guards against a licence check that waves everything through.

    use super::is_allowed;

    #[test]
    fn expressions() {
        let allowed = [
            "MIT",
            "Apache-2.0",
            "Unicode-3.0",
            "Apache-2.0 WITH LLVM-exception",
        ];
        for (expression, expected) in [
            ("MIT", true),
            ("GPL-3.0-only", false),
            ("MIT OR GPL-3.0-only", true),
            ("MIT AND GPL-3.0-only", false),
            ("MIT/Apache-2.0", true),
            ("(MIT OR GPL-3.0-only) AND Unicode-3.0", true),
            ("(MIT OR Apache-2.0) AND GPL-2.0-only", false),
            ("GPL-2.0-only OR (MIT AND BSD-4-Clause)", false),
            ("Apache-2.0 WITH LLVM-exception", true),
            ("MIT WITH LLVM-exception", false),
            ("GPL-2.0-only OR (MIT AND Unicode-3.0)", true),
            ("GPL-2.0-only AND (MIT OR Unicode-3.0)", false),
        ] {
            assert_eq!(
                is_allowed(expression, &allowed),
                Ok(expected),
                "{expression}"
            );
        }
        for wrong in ["", "MIT OR", "MIT MIT", "(MIT", "MIT WITH"] {
            assert!(is_allowed(wrong, &allowed).is_err(), "{wrong}");
        }
    }
}
