//! What is counted: notifications of the daemons, and exits while blocks are read.

use anyhow::{Result, ensure};
use berth_tests_framework::daemons::Daemon;
use berth_tests_framework::kernel_counts::TracepointCount;
use berth_tests_framework::vmm::Vm;
use berth_tests_framework::wait::{seconds, until};

/// Requests that the data path is watched for.
const REQUESTS: u64 = 10_000;
/// KVM_EXIT_IO and KVM_EXIT_MMIO of the kernel's API.
const KVM_EXIT_IO: u32 = 2;
const KVM_EXIT_MMIO: u32 = 6;

/// Doorbells and interrupts of one daemon.
#[derive(Debug)]
pub(crate) struct Notifications {
    pub(crate) daemon: String,
    pub(crate) doorbells: u64,
    pub(crate) interrupts: u64,
    pub(crate) requests: u64,
}

/// Totals since the daemons started.
pub(crate) fn notifications(daemons: &[&Daemon]) -> Result<Vec<Notifications>> {
    daemons
        .iter()
        .map(|daemon| {
            Ok(Notifications {
                daemon: daemon.process().name().to_owned(),
                doorbells: daemon.total("berth_kicks_total")?,
                interrupts: daemon.total("berth_calls_total")?,
                requests: daemon.total("berth_requests_total")?,
            })
        })
        .collect()
}

/// Exits to user space while the guest reads blocks and does nothing else, as the kernel counts them.
#[derive(Debug)]
pub(crate) struct DataPath {
    pub(crate) requests: u64,
    pub(crate) doorbells: u64,
    pub(crate) interrupts: u64,
    pub(crate) io_exits: u64,
    pub(crate) mmio_exits: u64,
}

impl DataPath {
    /// Lets the guest read blocks; looks from the first request to the ten-thousandth, in which time
    /// nothing passes over the console.
    pub(crate) fn measure(vm: &mut Vm, disk: &Daemon) -> Result<Self> {
        let tids: Vec<_> = vm
            .process
            .threads()?
            .into_iter()
            .filter(|(_, name)| name.starts_with("vcpu"))
            .map(|(tid, _)| tid)
            .collect();
        ensure!(
            !tids.is_empty(),
            "no vcpu threads in {:?}",
            vm.process.threads()?
        );
        let count = |reason| {
            let filter = format!("reason == {reason}");
            TracepointCount::start("kvm", "kvm_userspace_exit", &filter, &tids)
        };
        let command = format!(
            "dd if=/dev/vda of=/dev/null bs=4k iflag=direct count={} 2>/dev/null",
            REQUESTS + REQUESTS / 10
        );
        let before = disk.total("berth_requests_total")?;
        let id = vm.console.start(&command)?;
        let wait = |requests: u64| {
            until(&format!("{requests} requests"), seconds(120), || {
                let done = disk.total("berth_requests_total")?;
                Ok((done >= requests).then_some(done))
            })
        };
        let start = wait(before + REQUESTS / 100)?;
        let (mut io, mut mmio) = (count(KVM_EXIT_IO)?, count(KVM_EXIT_MMIO)?);
        let (doorbells, interrupts) = (
            disk.total("berth_kicks_total")?,
            disk.total("berth_calls_total")?,
        );
        let end = wait(start + REQUESTS)?;
        let (io_exits, mmio_exits) = (io.read()?, mmio.read()?);
        let path = Self {
            requests: end - start,
            doorbells: disk.total("berth_kicks_total")? - doorbells,
            interrupts: disk.total("berth_calls_total")? - interrupts,
            io_exits,
            mmio_exits,
        };
        let output = vm.console.finish(id, &command, seconds(120))?;
        ensure!(
            output.rc == 0,
            "the guest's reads failed: {}",
            output.stdout
        );
        Ok(path)
    }
}
