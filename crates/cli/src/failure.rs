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
}

impl Failure {
    /// `what: why; what to do`, without the image's name.
    pub(crate) fn new(text: impl Display) -> Self {
        Self {
            text: text.to_string(),
            code: 1,
        }
    }

    /// A command line whose parts do not go together.
    pub(crate) fn usage(text: impl Display) -> Self {
        Self::new(text).with_code(2)
    }

    pub(crate) fn with_code(mut self, code: u8) -> Self {
        self.code = code;
        self
    }

    pub(crate) fn code(&self) -> ExitCode {
        ExitCode::from(self.code)
    }

    pub(crate) fn print(&self, image: &Path) {
        crate::output::complain(&self.line(image));
    }

    /// The facade's errors name the image already; others get it in front.
    fn line(&self, image: &Path) -> String {
        let image = image.display().to_string();
        if image.is_empty() || self.text.contains(&image) {
            format!("urus: {}", self.text)
        } else {
            format!("urus: {image}: {}", self.text)
        }
    }
}

impl From<urus::Error> for Failure {
    fn from(error: urus::Error) -> Self {
        Self::new(error)
    }
}

impl From<urus_listen::Error> for Failure {
    fn from(error: urus_listen::Error) -> Self {
        Self::new(error)
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
    fn the_image_is_named_once() {
        let image = Path::new("a.qcow2");
        assert_eq!(
            Failure::new("it is full").line(image),
            "urus: a.qcow2: it is full"
        );
        let named = Failure::new("a.qcow2: it is full");
        assert_eq!(named.line(image), "urus: a.qcow2: it is full");
    }
}
