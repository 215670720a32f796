//! Sizes as qemu-img reads and prints them.

use std::str::FromStr;

/// Largest size: what a file offset can say.
const MAX_BYTES: u64 = i64::MAX.unsigned_abs();

/// A number of bytes from the command line: `1000`, `0x1000`, `8G`, `1.5k`. Suffixes b, k, M, G, T, P, E in either case, powers of 1024.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size(pub(crate) u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bytes = parse(text.trim_start()).ok_or_else(|| {
            format!("'{text}' is no size: give bytes, or a number with k, M, G, T, P or E (8G)")
        })?;
        u64::try_from(bytes)
            .ok()
            .filter(|&bytes| bytes <= MAX_BYTES)
            .map(Self)
            .ok_or_else(|| format!("'{text}' is too large: at most {MAX_BYTES} bytes"))
    }
}

fn parse(text: &str) -> Option<u128> {
    let text = text.strip_prefix('+').unwrap_or(text);
    if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        let digits = hex.bytes().all(|byte| byte.is_ascii_hexdigit());
        return (digits && !hex.is_empty())
            .then(|| u128::from_str_radix(hex, 16))?
            .ok();
    }
    let (number, unit) = match text.chars().next_back()? {
        last if last.is_ascii_alphabetic() => (&text[..text.len() - 1], unit(last)?),
        _ => (text, 1),
    };
    let (whole, fraction) = match number.split_once('.') {
        Some((whole, fraction)) => (whole, Some(fraction)),
        None => (number, None),
    };
    let digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    let is_number = digits(whole)
        && fraction.is_none_or(digits)
        && whole.len() + fraction.map_or(0, str::len) > 0;
    // Half a byte is none.
    if !is_number || (fraction.is_some() && unit == 1) {
        return None;
    }
    // Too long to be a size is too large to be one.
    let whole: u128 = match whole {
        "" => 0,
        whole => whole.parse().unwrap_or(u128::from(u64::MAX)),
    };
    let bytes = whole.min(u128::from(u64::MAX)).checked_mul(unit)?;
    // More digits than make a difference.
    let fraction: &str = fraction.map_or("", |fraction| &fraction[..fraction.len().min(18)]);
    let scale = 10_u128.pow(u32::try_from(fraction.len()).expect("at most 18"));
    let part = fraction.parse::<u128>().unwrap_or(0) * unit;
    bytes.checked_add((part + scale / 2) / scale)
}

fn unit(suffix: char) -> Option<u128> {
    let power = "bkmgtpe".find(suffix.to_ascii_lowercase())?;
    Some(1 << (10 * power))
}

/// A size for people, as qemu-img prints it: three significant digits and a binary unit.
pub(crate) fn human(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = 0;
    #[allow(clippy::cast_precision_loss, reason = "three digits are shown")]
    let mut value = bytes as f64;
    // The larger unit as soon as the integer part would have four digits.
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{} {}", three_digits(value), UNITS[unit])
}

/// C's `%.3g` for values from 0 to 9999.
fn three_digits(value: f64) -> String {
    let decimals = match value {
        // It rounds to four digits, which `%g` shows with an exponent.
        v if v >= 999.5 => return format!("{:.0}e+03", v / 1000.0),
        v if v >= 99.95 => 0,
        v if v >= 9.995 => 1,
        v if v >= 1.0 => 2,
        v if v >= 0.1 => 3,
        _ => 4,
    };
    let text = format!("{value:.decimals$}");
    if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    } else {
        text
    }
}

#[cfg(test)]
mod tests {
    //! Guards against sizes that mean something else here than in qemu-img. (`tests/qemu_img.rs` asks the real one.)
    use super::*;

    fn bytes(text: &str) -> Option<u64> {
        text.parse::<Size>().ok().map(|size| size.0)
    }

    #[test]
    fn sizes_are_read_as_qemu_img_reads_them() {
        for (text, expected) in [
            ("1.5G", 3 << 29),
            ("10M", 10 << 20),
            ("5b", 5),
            ("5B", 5),
            ("1000", 1000),
            ("1K", 1024),
            ("1k", 1024),
            ("0x1000", 4096),
            ("2.5k", 2560),
            ("7E", 7 << 60),
            (" 1G", 1 << 30),
            ("+5", 5),
            ("1.0000001k", 1024),
            (".5G", 1 << 29),
            ("1.G", 1 << 30),
            ("2T", 2 << 40),
            ("1P", 1 << 50),
            ("0", 0),
            ("9223372036854775807", MAX_BYTES),
        ] {
            assert_eq!(bytes(text), Some(expected), "{text}");
        }
        for text in [
            "",
            " ",
            "1e3",
            "0x1k",
            "0x",
            "-1",
            "abc",
            "1.5",
            "16E",
            "8E",
            "1G5",
            "1 G",
            "1s",
            ".",
            ".k",
            "k",
            "++1",
            "1.5.5G",
            "é",
            "1é",
            "9223372036854775808",
            "99999999999999999999999999999999999999999999",
            "99999999999999999999999999999999999999999999E",
        ] {
            assert_eq!(bytes(text), None, "{text}");
        }
    }

    #[test]
    fn sizes_are_shown_as_qemu_img_shows_them() {
        for (bytes, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1024, "1 KiB"),
            (208_896, "204 KiB"),
            (328_192, "320 KiB"),
            (1_142_784, "1.09 MiB"),
            (1_610_612_736, "1.5 GiB"),
            (1023 << 10, "0.999 MiB"),
            (1_023_900, "1e+03 KiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(human(bytes), text, "{bytes}");
        }
    }
}
