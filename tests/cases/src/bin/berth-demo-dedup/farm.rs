//! Guests of one round, each with a disk of its own behind a berth-blk.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use berth_tests_framework::daemons::{BlkSettings, Daemon};
use berth_tests_framework::image;
use berth_tests_framework::process::run as run_program;
use berth_tests_framework::story::Context;
use berth_tests_framework::vmm::{BOOT_LIMIT, Vm, VmBuilder};
use berth_tests_framework::wait::seconds;

use crate::Progress;
use crate::measure::Taken;

/// Of each guest.
const SIZE: &str = "512M";
/// The trust domain that the tuner merges.
pub(crate) const DOMAIN: &str = "demo";
/// What a guest has that no other has, in MiB.
pub(crate) const OWN_MIB: u32 = 16;
/// Reads every file of /usr and sums it up: the page cache of a guest that has been in use.
const READ: &str = "cd /usr && find . -xdev -type f -print0 | sort -z | xargs -0 md5sum | md5sum";

/// How the guests' memory is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Memory {
    /// A memfd that the disk's daemon maps, all of it.
    Shared,
    /// The DMA window is shared with the daemon; the rest can be merged.
    Merged,
}

impl Memory {
    fn setting(self) -> String {
        match self {
            Self::Shared => format!("{SIZE},shared=on"),
            Self::Merged => format!("{SIZE},mergeable=on"),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Shared => "shared memory (shared=on)",
            Self::Merged => "a DMA window and memory that can be merged (mergeable=on)",
        }
    }
}

/// A copy of the demo disk for each guest.
pub(crate) fn disks(context: &Context, count: u32) -> Result<Vec<PathBuf>> {
    let source = context.asset("demo-disk.raw").display().to_string();
    (1..=count)
        .map(|number| {
            let disk = context.scratch(&format!("disk{number}.img"));
            run_program(
                "cp",
                &["--sparse=always", &source, &disk.display().to_string()],
            )?;
            Ok(disk)
        })
        .collect()
}

/// All guests went down in order.
pub(crate) fn prove_clean(disks: &[PathBuf]) -> Result<()> {
    disks.iter().try_for_each(|disk| image::require_clean(disk))
}

struct Guest {
    name: String,
    vm: Vm,
    disk: Daemon,
}

/// The guests of a round.
pub(crate) struct Farm {
    guests: Vec<Guest>,
    sockets: PathBuf,
}

impl Farm {
    /// Starts all and waits until all are up.
    pub(crate) fn start(
        progress: &Progress<'_>,
        disks: &[PathBuf],
        memory: Memory,
    ) -> Result<Self> {
        let (count, how) = (disks.len(), memory.name());
        progress.step(&format!("starting {count} guests of {SIZE} on {how}"));
        let context = progress.context;
        let sockets = context.scratch("vms");
        std::fs::create_dir_all(&sockets)?;
        let mut guests = Vec::new();
        for (number, disk) in (1..).zip(disks) {
            let name = format!("guest{number}");
            let daemon = Daemon::blk(
                context,
                &format!("disk{number}"),
                disk,
                BlkSettings::default(),
            )?;
            let vm = VmBuilder::new(context, &name)
                .memory(&memory.setting())
                .platform(&format!("trust_domain={DOMAIN}"))
                .append("berth.root=/dev/vda")
                .disk(daemon.socket(), "")
                .api_socket(sockets.join(format!("{name}.sock")))
                .start(context)?;
            let guest = Guest {
                name,
                vm,
                disk: daemon,
            };
            guests.push(guest);
        }
        for guest in &mut guests {
            guest.vm.console.wait_ready(2 * BOOT_LIMIT)?;
            progress.step(&format!("{} is up", guest.name));
        }
        Ok(Self { guests, sockets })
    }

    /// Folder of the API sockets.
    pub(crate) fn sockets(&self) -> &Path {
        &self.sockets
    }

    pub(crate) fn names(&self) -> Vec<String> {
        self.guests.iter().map(|guest| guest.name.clone()).collect()
    }

    /// Each reads its whole system, and has something of its own. The sum of what it read, which all have in common.
    pub(crate) fn work(&mut self, progress: &Progress<'_>) -> Result<String> {
        progress.step(&format!(
            "each reads all of /usr, and makes {OWN_MIB} MiB of which no other has the like"
        ));
        let own = format!("dd if=/dev/urandom of=/dev/shm/own bs=1M count={OWN_MIB} 2>/dev/null");
        self.all(&own)?;
        let sums = self.sums()?;
        let first = sums.first().context("no guests")?.clone();
        ensure!(
            sums.iter().all(|sum| *sum == first),
            "the guests read different systems: {sums:?}"
        );
        Ok(first)
    }

    /// The sum over /usr that each guest finds.
    pub(crate) fn sums(&mut self) -> Result<Vec<String>> {
        let first_word = |text: String| {
            text.split_whitespace()
                .next()
                .unwrap_or_default()
                .to_owned()
        };
        Ok(self.all(READ)?.into_iter().map(first_word).collect())
    }

    /// Runs a command in all guests at once.
    fn all(&mut self, command: &str) -> Result<Vec<String>> {
        let started: Vec<u32> = self
            .guests
            .iter_mut()
            .map(|guest| guest.vm.console.start(command))
            .collect::<Result<_>>()?;
        self.guests
            .iter_mut()
            .zip(started)
            .map(|(guest, id)| {
                let output = guest.vm.console.finish(id, command, seconds(180))?;
                if output.rc != 0 {
                    bail!(
                        "{}: '{command}' ended with {}: {}",
                        guest.name,
                        output.rc,
                        output.stdout
                    );
                }
                Ok(output.stdout)
            })
            .collect()
    }

    /// What each takes of the host.
    pub(crate) fn measure(&self) -> Result<Vec<Taken>> {
        self.guests
            .iter()
            .map(|guest| Taken::of(&guest.name, &guest.vm.process, guest.disk.process()))
            .collect()
    }

    /// All go down in order.
    pub(crate) fn power_off(mut self, progress: &Progress<'_>) -> Result<()> {
        progress.step("powering the guests off");
        for guest in &mut self.guests {
            guest.vm.console.start("systemctl poweroff")?;
        }
        for guest in &mut self.guests {
            guest.vm.process.wait_success(seconds(120))?;
            guest.disk.kill();
        }
        Ok(())
    }
}
