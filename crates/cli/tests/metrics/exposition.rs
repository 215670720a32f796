//! Reads Prometheus's text format, version 0.0.4, and takes nothing that a strict reader would not.

use std::collections::{BTreeMap, BTreeSet};

/// A metric with its series.
#[derive(Debug, Default)]
pub(crate) struct Family {
    pub(crate) kind: String,
    /// By name and labels, as they are printed.
    pub(crate) series: BTreeMap<(String, Labels), f64>,
}

pub(crate) type Labels = Vec<(String, String)>;

/// All metrics by name.
#[derive(Debug)]
pub(crate) struct Exposition(pub(crate) BTreeMap<String, Family>);

impl Exposition {
    pub(crate) fn parse(text: &str) -> Self {
        assert!(text.ends_with('\n'), "the last line has no end");
        let mut families: BTreeMap<String, Family> = BTreeMap::new();
        let mut described = None;
        let mut current = String::new();
        for line in text.lines() {
            if let Some(help) = line.strip_prefix("# HELP ") {
                let (name, what) = help.split_once(' ').expect("a description");
                assert!(is_name(name) && !what.is_empty(), "{line}");
                described = Some(name.to_owned());
            } else if let Some(kind) = line.strip_prefix("# TYPE ") {
                let (name, kind) = kind.split_once(' ').expect("a type");
                assert_eq!(described.as_deref(), Some(name), "described just before");
                assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
                let family = Family {
                    kind: kind.to_owned(),
                    ..Family::default()
                };
                assert!(
                    families.insert(name.to_owned(), family).is_none(),
                    "{name} twice"
                );
                current = name.to_owned();
            } else {
                let (name, labels, value) = sample(line);
                let family = families.get_mut(&current).expect("a type before a sample");
                let suffixes: &[&str] = match &*family.kind {
                    "histogram" => &["_bucket", "_sum", "_count"],
                    _ => &[""],
                };
                assert!(
                    suffixes
                        .iter()
                        .any(|suffix| format!("{current}{suffix}") == name),
                    "{line} among {current}"
                );
                let before = family.series.insert((name, labels), value);
                assert!(before.is_none(), "{line} twice");
            }
        }
        for (name, family) in &families {
            family.check(name);
        }
        Self(families)
    }

    /// The series with that name and these labels, among others: added up.
    pub(crate) fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let has = |given: &Labels, (name, value): &(&str, &str)| {
            given.iter().any(|(n, v)| n == name && v == value)
        };
        let found: Vec<f64> = self
            .0
            .values()
            .flat_map(|family| &family.series)
            .filter(|((n, given), _)| n == name && labels.iter().all(|label| has(given, label)))
            .map(|(_, value)| *value)
            .collect();
        assert!(!found.is_empty(), "no {name} with {labels:?}: {self:?}");
        found.iter().sum()
    }
}

impl Family {
    fn check(&self, name: &str) {
        assert_eq!(self.kind == "counter", name.ends_with("_total"), "{name}");
        if self.kind != "histogram" {
            return;
        }
        let mut buckets: BTreeMap<Labels, Vec<(f64, f64)>> = BTreeMap::new();
        for ((_, labels), value) in &self.series {
            let mut labels = labels.clone();
            if let Some(at) = labels.iter().position(|(name, _)| name == "le") {
                let end = number(&labels.remove(at).1);
                buckets.entry(labels).or_default().push((end, *value));
            }
        }
        for (labels, mut buckets) in buckets {
            buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
            assert!(
                buckets.is_sorted_by(|a, b| a.0 < b.0 && a.1 <= b.1),
                "{name}: not cumulative"
            );
            let (end, all) = buckets.last().expect("one at least");
            let count = self.series[&(format!("{name}_count"), labels.clone())];
            assert!(end.is_infinite() && *all == count, "{name}{labels:?}");
            let sum = self.series[&(format!("{name}_sum"), labels)];
            assert_eq!(sum > 0.0, count > 0.0, "{name}");
        }
    }
}

fn is_name(name: &str) -> bool {
    let letter = |c: char| c.is_ascii_alphabetic() || c == '_';
    name.starts_with(letter) && name.chars().all(|c| letter(c) || c.is_ascii_digit())
}

fn number(text: &str) -> f64 {
    match text {
        "+Inf" => f64::INFINITY,
        _ => text
            .parse()
            .unwrap_or_else(|_| panic!("{text:?} is no number")),
    }
}

/// `name{label="value",...} number`
fn sample(line: &str) -> (String, Labels, f64) {
    let end = line.find(['{', ' ']).expect("a sample");
    let name = &line[..end];
    assert!(is_name(name), "{line}");
    let mut rest = &line[end..];
    let mut labels = Labels::new();
    let mut names = BTreeSet::new();
    if let Some(inner) = rest.strip_prefix('{') {
        rest = inner;
        loop {
            let (name, after) = rest.split_once("=\"").expect("a label");
            assert!(is_name(name) && names.insert(name), "{line}");
            let (value, after) = label_value(after);
            labels.push((name.to_owned(), value));
            match after.strip_prefix(',') {
                Some(next) => rest = next,
                None => {
                    rest = after.strip_prefix('}').expect("the labels' end");
                    break;
                }
            }
        }
    }
    let value = rest.strip_prefix(' ').expect("a space");
    (name.to_owned(), labels, number(value))
}

/// A value without its escapes, and what follows its closing quote.
fn label_value(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return (value, &text[at + 1..]),
            '\\' => value.push(match chars.next() {
                Some((_, 'n')) => '\n',
                Some((_, c @ ('\\' | '"'))) => c,
                other => panic!("{other:?} is no escape"),
            }),
            c => value.push(c),
        }
    }
    panic!("{text:?} has no closing quote");
}
