//! `-o key=value,key=value`, as qemu-img takes it.

/// The options of all `-o` arguments together, in order. A comma in a value is written twice; a key alone means `on`.
pub(crate) fn parse(arguments: &[String]) -> Result<Vec<(String, String)>, String> {
    let mut options = Vec::new();
    for argument in arguments {
        for item in split(argument) {
            if item.is_empty() {
                return Err(format!(
                    "-o {argument}: an option is missing between the commas"
                ));
            }
            let (key, value) = match item.split_once('=') {
                Some((key, value)) => (key.to_owned(), value.to_owned()),
                None => (item, "on".to_owned()),
            };
            if key.is_empty() {
                return Err(format!("-o {argument}: a value without a name"));
            }
            options.push((key, value));
        }
    }
    Ok(options)
}

fn split(argument: &str) -> Vec<String> {
    let mut items = vec![String::new()];
    let mut chars = argument.chars().peekable();
    while let Some(char) = chars.next() {
        if char != ',' {
            items.last_mut().expect("never empty").push(char);
        } else if chars.next_if_eq(&',').is_some() {
            items.last_mut().expect("never empty").push(',');
        } else {
            items.push(String::new());
        }
    }
    items
}

/// `on` or `off`, as qemu-img takes booleans.
pub(crate) fn boolean(key: &str, value: &str) -> Result<bool, String> {
    match value {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => Err(format!("the option {key} is 'on' or 'off', not '{value}'")),
    }
}

#[cfg(test)]
mod tests {
    //! Guards against options that are taken apart at the wrong comma.
    use super::*;

    fn parsed(arguments: &[&str]) -> Vec<(String, String)> {
        let arguments: Vec<_> = arguments.iter().map(ToString::to_string).collect();
        parse(&arguments).unwrap()
    }

    #[test]
    fn options_are_taken_apart() {
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        assert_eq!(
            parsed(&["a=1,b=x=y", "c", "d=e,,f,g="]),
            [
                pair("a", "1"),
                pair("b", "x=y"),
                pair("c", "on"),
                pair("d", "e,f"),
                pair("g", "")
            ]
        );
        assert!(parse(&["a=1,".into()]).is_err());
        assert!(parse(&["=1".into()]).is_err());
        assert!(parse(&[String::new()]).is_err());
    }

    #[test]
    fn booleans_are_on_or_off() {
        assert_eq!(boolean("k", "on"), Ok(true));
        assert_eq!(boolean("k", "off"), Ok(false));
        assert!(boolean("k", "maybe").unwrap_err().contains("maybe"));
    }
}
