use crate::{Arguments, tally::Tally};
pub(crate) fn run(arguments: &Arguments) -> Tally {
    Tally::new("space", arguments.seed, arguments.budget(1), &["fills"])
}
