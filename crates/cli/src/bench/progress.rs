//! The bar that tells how far a suite is.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Drawn on a terminal only.
pub(super) fn progress(total: u64) -> ProgressBar {
    let target = if std::io::stderr().is_terminal() {
        ProgressDrawTarget::stderr()
    } else {
        ProgressDrawTarget::hidden()
    };
    let style = ProgressStyle::with_template("{bar:40} {percent:>3} %  {eta} left  {msg}")
        .expect("a template that is right");
    ProgressBar::with_draw_target(Some(total), target).with_style(style)
}
