//! The urus command.
fn main() {}
