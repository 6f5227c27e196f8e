//! The guest's console for a person.

use std::path::Path;
use std::process::Stdio;

use anyhow::{Result, bail};
use berth_tests_framework::process::describe;
use berth_tests_framework::story::Context;

use crate::steps::{Backends, HOST};

/// Boots the demo guest on this terminal and stays until it is off.
pub(crate) fn run(context: &Context, out: &Path) -> Result<()> {
    println!(
        "Debian on berth-vmm, its disk on berth-blk, its network on berth-net; {HOST} is the host."
    );
    println!("'poweroff' in the guest ends it.");
    let backends = Backends::start(context, out)?;
    let guest = backends.guest(context).append("berth.noagent");
    let mut command = guest.command_on_terminal(context);
    let status = command.stdin(Stdio::inherit()).status()?;
    if !status.success() {
        bail!(
            "berth-vmm ended with {}\n{}",
            describe(status),
            context.log_tails()
        );
    }
    Ok(())
}
