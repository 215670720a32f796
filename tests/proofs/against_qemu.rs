use crate::{Arguments, tally::Tally};
pub(crate) fn run(arguments: &Arguments) -> Tally {
    Tally::new("qemu", arguments.seed, arguments.budget(1), &["turns"])
}
