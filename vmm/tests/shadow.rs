//! Shadow queues: a device of somebody else's code serves rings in memory that it does not have, with rings in memory
//! that no guest has ever run in; and a berth-blk serves a micro-guest none of whose memory it has.

#![allow(clippy::unwrap_used, reason = "test code outside of test functions")]

mod bench;
mod ring;
mod stock;
mod support;

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bench::{Bench, PATIENCE};
use berth_vmm::config::MemoryConfig;
use berth_vmm::devices::virtio::device::TransportNotify;
use berth_vmm::memory::{GuestRam, Mode};
use berth_vmm::vhost_user::{Frontends, SessionState};
use stock::Stock;
use support::daemons::{daemon, has_daemons, image, kill};
use support::virtio::{Access, BUFFER};
use support::{Code, Guest, eventually};
use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::tempdir::TempDir;

const MIB: u64 = 1 << 20;

struct Deaf;

impl TransportNotify for Deaf {
    fn config_changed(&self) {}
    fn needs_reset(&self) {
        panic!("the device needs a reset");
    }
}

fn protocol() -> Protocol {
    Protocol::MQ | Protocol::CONFIG | Protocol::REPLY_ACK
}

/// A disk with two queues, in a guest with memory on both sides of the PCI hole and none of it shared.
fn bench() -> Bench {
    let memory = MemoryConfig::of((3 << 30) + 4 * MIB);
    let ram = GuestRam::with_mode(&memory, Mode::Private).unwrap();
    let frontends = Frontends::new().unwrap().reaching(&ram);
    Bench::new(ram, frontends, Arc::new(Deaf))
}

fn count(bench: &Bench, name: &str) -> u64 {
    let counters = bench.frontends.sessions()[0].shadow.clone().unwrap();
    let found = counters.iter().find(|(of, _)| *of == name);
    found.unwrap().1
}

#[test]
fn rings_that_the_device_does_not_have_are_served_and_again_after_a_reset() {
    let mut bench = bench();
    let stock = Stock::listen(&bench.path, protocol());
    assert!(bench.frontends.wait_settled(PATIENCE));
    for round in 0..3 {
        let (mut low, mut high) = (bench.driver(MIB), bench.driver((4 << 30) + MIB));
        bench.activate(&[&low, &high]);
        for _ in 0..200 {
            low.submit();
            high.submit();
            low.complete();
            high.complete();
        }
        bench.reset();
        let done = stock.seen.requests.load(Ordering::SeqCst);
        assert_eq!(done, 400 * (round + 1));
        // Nobody looks at it any more.
        low.submit();
    }
    assert_eq!(count(&bench, "shadow_requests"), 1200);
    assert_eq!(count(&bench, "shadow_copied_out_bytes"), 1200 * 64);
    assert!(bench.frontends.stop(PATIENCE).is_empty());
    assert_eq!(stock.seen.requests.load(Ordering::SeqCst), 1200);
}

#[test]
fn a_device_that_died_goes_on_where_it_stopped() {
    let mut bench = bench();
    let mut stock = Stock::listen(&bench.path, protocol());
    assert!(bench.frontends.wait_settled(PATIENCE));
    let mut driver = bench.driver((4 << 30) + MIB);
    bench.activate(&[&driver]);
    for death in 0..3 {
        for _ in 0..100 {
            driver.submit();
            driver.complete();
        }
        let seen = stock.die();
        bench.wait_for(SessionState::Waiting);
        // Asked while nobody is there.
        driver.submit();
        stock = Stock::listen(&bench.path, protocol());
        driver.complete();
        let expected = 100 + usize::from(death > 0);
        assert_eq!(seen.requests.load(Ordering::SeqCst), expected);
    }
    assert_eq!(count(&bench, "shadow_requests"), 303);
    bench.reset();
}

#[test]
fn an_interrupt_that_moves_arrives_at_its_new_place() {
    let mut bench = bench();
    let _stock = Stock::listen(&bench.path, protocol());
    assert!(bench.frontends.wait_settled(PATIENCE));
    let mut driver = bench.driver(MIB);
    bench.activate(&[&driver]);
    let elsewhere = EventFd::new(EFD_NONBLOCK).unwrap();
    let moved = elsewhere.try_clone().unwrap();
    bench.device.set_call(0, moved);
    ring::wait(&elsewhere, "interrupt for what was missed");
    driver.submit();
    ring::wait(&elsewhere, "interrupt");
    driver.complete();
}

/// Where things are in the micro-guest, and on its disk.
const HEADER: u32 = BUFFER;
const STATUS: u32 = BUFFER + 0x100;
const DATA: u32 = BUFFER + 0x1000;
const SECTOR: u32 = 8;
const SECTOR_BYTES: usize = 512;
const LEN: u32 = 8192;
const MARK: u32 = 0x600d_cafe;

/// A request of type `kind` for the disk below the port, which the guest waits for, and then for its status.
fn request(code: Code, port: (u8, u8), below: (u8, u8), kind: u32, data: Access) -> Code {
    let chain = [
        (HEADER, 16, Access::Reads),
        (DATA, LEN, data),
        (STATUS, 1, Access::Writes),
    ];
    code.store32(HEADER, kind)
        .store32(HEADER + 4, 0)
        .store32(HEADER + 8, SECTOR)
        .store32(HEADER + 12, 0)
        .store32(STATUS, 0xff)
        .virtio_submit(port, below, 0, &chain)
        .virtio_complete()
        .wait32(STATUS, 0)
        .virtio_reset()
}

/// Writes, clears memory, reads and compares, again and again, and says so each time.
fn writes_and_reads(port: (u8, u8), below: (u8, u8)) -> Code {
    let (first, last) = (DATA, DATA + LEN - 4);
    let code = Code::new().store32(first, MARK).store32(last, MARK + 1);
    let code = request(code, port, below, 1, Access::Reads);
    let code = code.store32(first, 0).store32(last, 0);
    request(code, port, below, 0, Access::Writes)
        .wait32(first, MARK)
        .wait32(last, MARK + 1)
        .print("round\n")
        .again()
}

fn rounds(guest: &Guest, count: usize) {
    eventually("a round of the guest", || {
        (guest.lines().len() >= count).then_some(())
    });
}

/// What the guest writes is on the image.
fn holds_the_mark(image: &Path) {
    let file = std::fs::File::open(image).unwrap();
    let mut data = vec![0; LEN as usize];
    let at = u64::from(SECTOR) * SECTOR_BYTES as u64;
    file.read_exact_at(&mut data, at).unwrap();
    assert_eq!(data[..4], MARK.to_le_bytes());
    assert_eq!(data[data.len() - 4..], (MARK + 1).to_le_bytes());
}

/// What the daemon has mapped of this process.
fn maps(pid: i32) -> String {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let ours = maps.lines().filter(|line| line.contains("berth-"));
    ours.filter(|line| line.contains("memfd")).collect()
}

#[test]
fn a_disk_serves_a_guest_whose_memory_is_private_and_goes_on_when_its_daemon_was_killed() {
    if !has_daemons() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("image");
    let disk = image(&path);
    let code = writes_and_reads((0, 2), (1, 0));
    let guest = Guest::start_with(&code, &["--disk", &disk, "--memory=size=32M,shared=off"]);
    rounds(&guest, 2);
    for _ in 0..3 {
        let first = eventually("a daemon", || daemon(&path));
        let mapped = maps(first);
        assert!(mapped.contains("berth-bounce"), "{mapped}");
        assert!(!mapped.contains("berth-guest-ram"), "{mapped}");
        kill(first);
        // One may have ended in between, and one may have been under way.
        let done = guest.lines().len();
        rounds(&guest, done + 3);
    }
    assert!(guest.lines().iter().all(|line| line == "round"));
    holds_the_mark(&path);
    let requests = guest.counter("_disk0", "shadow_requests").unwrap();
    assert!(requests >= 2 * guest.lines().len() as u64 - 2, "{requests}");
    assert_eq!(guest.counter("_disk0", "shadow_stalls"), Some(0));
    // Rings and a request of 8 KiB, of an address space of 64 MiB; the host may have larger pages there.
    let bounce = guest.counter("_disk0", "shadow_bounce_bytes").unwrap();
    assert!((4096..16 << 20).contains(&bounce), "{bounce}");
    assert_eq!(guest.api("PUT", "vm.pause").0, 204);
    assert_eq!(guest.api("PUT", "vm.resume").0, 204);
    let done = guest.lines().len();
    rounds(&guest, done + 2);
    assert_eq!(guest.api("PUT", "vmm.shutdown").0, 204);
    let (code, stderr) = guest.wait();
    assert_eq!(code, 0, "{stderr}");
}

/// Its memory is shared, and yet no daemon has it.
#[test]
fn a_disk_may_be_kept_from_memory_that_is_shared() {
    if !has_daemons() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("image");
    let disk = format!("{},dma=shadow", image(&path));
    let guest = Guest::start_with(&writes_and_reads((0, 2), (1, 0)), &["--disk", &disk]);
    rounds(&guest, 2);
    let mapped = maps(eventually("a daemon", || daemon(&path)));
    assert!(!mapped.contains("berth-guest-ram"), "{mapped}");
    let (_, info) = guest.api("GET", "vm.info");
    assert!(info.contains(r#""dma":"shadow""#), "{info}");
}

/// The micro-guest takes no VIRTIO_F_ACCESS_PLATFORM, so the window is not for it; and what comes later never is.
#[test]
fn a_guest_with_a_window_is_served_where_it_does_not_keep_to_it() {
    if !has_daemons() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("image");
    let disk = image(&path);
    let memory = "--memory=size=192M,mergeable=on";
    let code = writes_and_reads((0, 2), (1, 0));
    let guest = Guest::start_pvh(&code, &["--disk", &disk, memory]);
    rounds(&guest, 3);
    let mapped = maps(eventually("a daemon", || daemon(&path)));
    assert!(mapped.contains("berth-bounce"), "{mapped}");
    holds_the_mark(&path);
    assert_eq!(guest.api("PUT", "vmm.shutdown").0, 204);
    let (code, stderr) = guest.wait();
    assert_eq!(code, 0, "{stderr}");
    let said = stderr.lines().find(|line| line.contains("shadow queues"));
    let said = said.expect("no line in the log");
    assert!(said.contains("VIRTIO_F_ACCESS_PLATFORM"), "{said}");
}

/// A disk that is added while the guest runs, to memory that is private and to memory with a window.
#[test]
fn a_disk_that_comes_later_is_served() {
    if !has_daemons() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let (path, first) = (dir.as_path().join("image"), dir.as_path().join("first"));
    let (_, first_disk) = (image(&path), image(&first));
    for (memory, disks) in [
        ("--memory=size=32M,mergeable=on", None),
        ("--memory=size=32M,shared=off", None),
        ("--memory=size=192M,mergeable=on", Some(first_disk.as_str())),
    ] {
        let (port, below) = match disks {
            None => ((0, 2), (1, 0)),
            Some(_) => ((0, 3), (2, 0)),
        };
        let code = Code::new()
            .pci_wait(port, 0x5a, 1 << 6, 1 << 6)
            .pci_write(port, 0x58, 0)
            .pci_wait(below, 2, 0xffff, 0x1042)
            .raw(writes_and_reads(port, below).bytes());
        let mut args = vec![memory, "--platform=hotplug_ports=1"];
        args.extend(disks.into_iter().flat_map(|disk| ["--disk", disk]));
        let guest = Guest::start_pvh(&code, &args);
        eventually("the guest runs", || {
            (guest.state() == "Running").then_some(())
        });
        let body = format!(r#"{{"path": "{}", "id": "late"}}"#, path.display());
        let (status, answer) = guest.put("vm.add-disk", &body);
        assert_eq!(status, 200, "{memory}: {answer}");
        rounds(&guest, 3);
        holds_the_mark(&path);
        let mapped = maps(eventually("a daemon", || daemon(&path)));
        assert!(mapped.contains("berth-bounce"), "{mapped}");
        assert!(!mapped.contains("berth-guest-ram"), "{mapped}");
        assert_eq!(guest.api("PUT", "vmm.shutdown").0, 204);
        assert_eq!(guest.wait().0, 0);
    }
}

/// The CPUs that a thread of a process may run on.
fn cpus(pid: i32, thread: &str) -> Option<String> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let read = |task: &Path, file: &str| std::fs::read_to_string(task.join(file)).ok();
    let mut tasks = tasks.flatten().map(|task| task.path());
    let task = tasks.find(|task| read(task, "comm").is_some_and(|name| name.trim() == thread))?;
    allowed(&read(&task, "status")?)
}

fn allowed(status: &str) -> Option<String> {
    let mut lines = status.lines();
    let line = lines.find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    Some(line.trim().to_owned())
}

/// Else vCPU and copying would take turns on its CPU.
#[test]
fn a_worker_is_not_kept_to_the_cpu_of_the_vcpu_that_started_it() {
    if !has_daemons() {
        return;
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let own = allowed(&status).unwrap();
    let first: String = own.chars().take_while(char::is_ascii_digit).collect();
    let dir = TempDir::new().unwrap();
    let disk = image(&dir.as_path().join("image"));
    let affinity = format!("boot=1,affinity=[0@[{first}]]");
    let args = [
        "--cpus",
        &affinity,
        "--disk",
        &disk,
        "--memory=size=32M,shared=off",
    ];
    let guest = Guest::start_with(&writes_and_reads((0, 2), (1, 0)), &args);
    rounds(&guest, 1);
    let vcpu = eventually("a vCPU", || cpus(guest.pid(), "vcpu0"));
    assert_eq!(vcpu, first);
    // The guest starts the device anew all the time, and a worker that has just begun may still be there.
    eventually("a worker anywhere", || {
        (cpus(guest.pid(), "sh0-_disk0")? == own).then_some(())
    });
}
