//! The urus command. One file per subcommand; what they share is in `common`, `failure`, `logging`, `output` and `size`.
#![forbid(unsafe_code)]

mod answers;
mod bench;
mod check;
mod common;
mod confine;
mod control;
mod create;
mod ctl;
mod failure;
mod holders;
mod info;
mod logging;
mod map;
mod metrics;
mod option_list;
mod output;
mod patience;
mod serve;
mod signals;
mod size;
mod vhost_user_blk;

use std::ffi::OsString;
use std::process::ExitCode;

/// A server outlives the moment in which there is no memory: see [`urus::hold_reserve`].
#[global_allocator]
static ALLOCATOR: urus::ReservingAllocator = urus::ReservingAllocator;

use clap::{ArgAction, Parser, Subcommand};

/// Fast, crash-safe QCOW2 images: serve, create and inspect them.
#[derive(Debug, Parser)]
#[command(name = "urus", version, propagate_version = true, max_term_width = 100)]
#[command(after_help = "To begin:  urus serve demo.qcow2 --create 8G\n\
                        Image commands take qemu-img's flags and print what it prints.")]
struct Cli {
    /// Say more on standard error: -v what happens, -vv details, -vvv everything
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    // By far the largest.
    Serve(Box<serve::Args>),
    #[command(name = "vhost-user-blk")]
    VhostUserBlk(vhost_user_blk::Args),
    Ctl(ctl::Args),
    Create(create::Args),
    Info(info::Args),
    Check(check::Args),
    Map(map::Args),
    Bench(bench::Args),
}

impl Command {
    /// The image that it is about, for logs.
    fn image(&self) -> &std::path::Path {
        match self {
            Self::Serve(args) => &args.image,
            Self::VhostUserBlk(args) => args.image(),
            Self::Ctl(args) => args.socket(),
            Self::Create(args) => args.file.as_deref().unwrap_or_else(|| "".as_ref()),
            Self::Info(args) => &args.file,
            Self::Check(args) => &args.file,
            Self::Map(args) => &args.file,
            Self::Bench(args) => args.image.as_deref().unwrap_or_else(|| "".as_ref()),
        }
    }
}

fn main() -> ExitCode {
    let arguments = vhost_user_blk::as_program(std::env::args_os().collect());
    if vhost_user_blk::asks_for_capabilities(&arguments) {
        return vhost_user_blk::print_capabilities();
    }
    let cli = match Cli::try_parse_from(&arguments) {
        Ok(cli) => cli,
        Err(error) => return not_understood(&error, &arguments),
    };
    let image = cli.command.image().to_owned();
    logging::start(cli.verbose, &image);
    let result = match cli.command {
        Command::Serve(args) => serve::run(*args),
        Command::VhostUserBlk(args) => vhost_user_blk::run(args),
        Command::Ctl(args) => ctl::run(args),
        Command::Create(args) => create::run(args),
        Command::Info(args) => info::run(args),
        Command::Check(args) => check::run(args),
        Command::Map(args) => map::run(args),
        Command::Bench(args) => bench::run(args),
    };
    result.unwrap_or_else(|failure| {
        failure.print(&image);
        failure.code()
    })
}

/// Prints the help that was asked for, or what is wrong with the command line.
///
/// An image command that was not understood exits with 1, as qemu-img does: 2 from `check` means a corrupt image. The others exit
/// with 2, as clap has it.
fn not_understood(error: &clap::Error, arguments: &[OsString]) -> ExitCode {
    match answers::to(error, arguments) {
        Some(answer) => output::complain(&answer),
        // A reader that has gone needs no help.
        None => drop(error.print()),
    }
    if !error.use_stderr() {
        return ExitCode::SUCCESS;
    }
    let command = arguments
        .iter()
        .skip(1)
        .find(|word| !word.as_encoded_bytes().starts_with(b"-"));
    let is_image_command =
        command.is_some_and(|word| IMAGE_COMMANDS.iter().any(|command| word == command));
    ExitCode::from(if is_image_command { 1 } else { 2 })
}

/// The commands that stand in for qemu-img's.
const IMAGE_COMMANDS: [&str; 4] = ["create", "info", "check", "map"];

#[cfg(test)]
mod tests {
    //! Guards against a command line that clap itself finds contradictory.
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
