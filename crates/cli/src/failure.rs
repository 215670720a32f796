//! How a command fails: one message that names the image, and an exit code.

use std::fmt::Display;
use std::path::Path;
use std::process::ExitCode;

/// What a command returns: an exit code of its own, or the reason why it could not do its work.
pub(crate) type Outcome = Result<ExitCode, Failure>;

/// Why a command could not do its work. Exit code 1 unless stated (2 is clap's, for a command line that makes no sense).
#[derive(Debug)]
pub(crate) struct Failure {
    text: String,
    code: u8,
    /// The text names the file that it is about, or is about none.
    is_complete: bool,
}

impl Failure {
    /// `what: why; what to do`, without the image's name.
    pub(crate) fn new(text: impl Display) -> Self {
        Self {
            text: plain(&text.to_string()),
            code: 1,
            is_complete: false,
        }
    }

    /// A text that names what it is about, which need not be the image of the command line.
    pub(crate) fn complete(text: impl Display) -> Self {
        Self {
            is_complete: true,
            ..Self::new(text)
        }
    }

    /// The same, with one thing more that the user can do.
    pub(crate) fn or(mut self, advice: &str) -> Self {
        self.text.push_str("; ");
        self.text.push_str(advice);
        self
    }

    /// A command line whose parts do not go together.
    pub(crate) fn usage(text: impl Display) -> Self {
        Self::complete(text).with_code(2)
    }

    pub(crate) fn with_code(mut self, code: u8) -> Self {
        self.code = code;
        self
    }

    pub(crate) fn code(&self) -> ExitCode {
        ExitCode::from(self.code)
    }

    pub(crate) fn has_code(&self, code: u8) -> bool {
        self.code == code
    }

    pub(crate) fn text(&self) -> &str {
        &self.text
    }

    pub(crate) fn print(&self, image: &Path) {
        crate::output::complain(&self.line(image));
    }

    /// Most of the facade's errors name their file already, which can be another one of the chain; others get the image in front.
    fn line(&self, image: &Path) -> String {
        let image = image.display().to_string();
        let is_named = self.text.starts_with(&format!("{image}: "));
        if image.is_empty() || self.is_complete || is_named {
            format!("urus: {}", self.text)
        } else {
            format!("urus: {image}: {}", self.text)
        }
    }
}

/// Without the operating system's numbers, which Rust adds to its texts.
fn plain(text: &str) -> String {
    let mut rest = text;
    let mut plain = String::with_capacity(text.len());
    while let Some((before, after)) = rest.split_once(" (os error ") {
        plain.push_str(before);
        rest = match after.split_once(')') {
            Some((number, after)) if number.bytes().all(|byte| byte.is_ascii_digit()) => after,
            _ => {
                plain.push_str(" (os error ");
                after
            }
        };
    }
    plain.push_str(rest);
    plain
}

impl From<urus::Error> for Failure {
    fn from(error: urus::Error) -> Self {
        use urus::EngineError as Engine;
        match &error {
            urus::Error::InUse { path, by_writer } => {
                Self::complete(crate::holders::explain(path, *by_writer))
            }
            urus::Error::Invalid { .. }
            | urus::Error::Closed
            | urus::Error::Engine(
                Engine::ReadOnly
                | Engine::OutOfRange { .. }
                | Engine::Unsupported { .. }
                | Engine::Closed,
            ) => Self::new(error),
            _ => Self::complete(error),
        }
    }
}

impl From<urus_listen::Error> for Failure {
    fn from(error: urus_listen::Error) -> Self {
        Self::complete(error)
    }
}

impl From<urus_nbd::Error> for Failure {
    fn from(error: urus_nbd::Error) -> Self {
        Self::new(error)
    }
}

impl From<urus_vhost_user::Error> for Failure {
    fn from(error: urus_vhost_user::Error) -> Self {
        Self::new(error)
    }
}

#[cfg(test)]
mod tests {
    //! Guards against messages that do not say which image they are about.
    use super::*;

    #[test]
    fn numbers_of_errors_are_left_out() {
        let missing = std::io::Error::from_raw_os_error(2);
        assert_eq!(
            Failure::new(format!("a: {missing}; b: {missing}")).text(),
            "a: No such file or directory; b: No such file or directory"
        );
        for text in ["", "(os error 2)", " (os error x)", "a (os error 2"] {
            assert_eq!(plain(text), text);
        }
    }

    #[test]
    fn the_image_is_named_once() {
        let image = Path::new("a.qcow2");
        assert_eq!(
            Failure::new("it is full").line(image),
            "urus: a.qcow2: it is full"
        );
        let named = Failure::new("a.qcow2: it is full");
        assert_eq!(named.line(image), "urus: a.qcow2: it is full");
        // Not by chance: the name of the image may be a word of the message.
        let word = Failure::new("the disk is full").line(Path::new("disk"));
        assert_eq!(word, "urus: disk: the disk is full");
        let other = Failure::complete("base.qcow2: it is full");
        assert_eq!(other.line(image), "urus: base.qcow2: it is full");
    }
}
