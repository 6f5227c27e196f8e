//! What each mode of guest memory looks like from outside: `/proc/PID/smaps` of the process that runs the guest.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot look at its process has failed"
)]

#[allow(dead_code, reason = "no ring is driven here")]
mod ring;
#[allow(dead_code, reason = "a disk that is there and no more")]
mod stock;
mod support;

use std::fs;

use stock::Stock;
use support::{Code, Guest, eventually, has_kvm, run};

use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;
use vmm_sys_util::tempdir::TempDir;

const SIZE_KIB: u64 = 64 << 10;

/// One mapping of smaps.
#[derive(Debug)]
struct Mapping {
    name: String,
    kib: u64,
    page_kib: u64,
    present_kib: u64,
    /// The part of it that is in transparent huge pages.
    huge_kib: u64,
    /// As VmFlags has it: `sh` shared, `mg` mergeable, `hg` and `nh` huge pages advised or not, `dd` not dumped.
    flags: Vec<String>,
}

impl Mapping {
    fn has(&self, flag: &str) -> bool {
        self.flags.iter().any(|has| has == flag)
    }
}

/// The one mapping of guest memory: of 64 MiB.
fn guest_memory(pid: i32) -> Mapping {
    let mut found = not_dumped(pid);
    found.retain(|mapping| mapping.kib == SIZE_KIB);
    assert_eq!(found.len(), 1, "{found:?}");
    found.remove(0)
}

/// Guest memory, in the order of smaps: little else that can be written is kept out of core dumps.
fn not_dumped(pid: i32) -> Vec<Mapping> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let mut found = Vec::new();
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap();
        let number = |word: Option<&str>| word.unwrap().parse().unwrap();
        let Some(key) = first.strip_suffix(':') else {
            found.push(Mapping {
                name: words.nth(4).unwrap_or_default().to_owned(),
                kib: 0,
                page_kib: 0,
                present_kib: 0,
                huge_kib: 0,
                flags: Vec::new(),
            });
            continue;
        };
        let mapping = found.last_mut().unwrap();
        match key {
            "Size" => mapping.kib = number(words.next()),
            "KernelPageSize" => mapping.page_kib = number(words.next()),
            "Rss" => mapping.present_kib = number(words.next()),
            "AnonHugePages" => mapping.huge_kib = number(words.next()),
            "VmFlags" => mapping.flags = words.map(str::to_owned).collect(),
            _ => {}
        }
    }
    // What devices with shadow queues have instead of it, or may have once.
    let bounce = |mapping: &Mapping| mapping.name.contains("berth-bounce");
    found.retain(|mapping| mapping.has("dd") && mapping.has("wr") && !bounce(mapping));
    found
}

/// A guest that runs with this memory, and its mapping.
fn started(memory: &str) -> (Guest, Mapping) {
    started_with(memory, &[])
}

/// The same with more arguments.
fn started_with(memory: &str, args: &[&str]) -> (Guest, Mapping) {
    let code = Code::new().print("here\n").halt();
    let memory = format!("--memory=size=64M{memory}");
    let guest = Guest::start_with(&code, &[&[memory.as_str()], args].concat());
    eventually("the guest runs", || {
        (guest.lines() == ["here"]).then_some(())
    });
    let mapping = guest_memory(guest.pid());
    (guest, mapping)
}

#[test]
fn shared_memory_is_a_file_that_nobody_merges() {
    if !has_kvm() {
        return;
    }
    for memory in ["", ",shared=on", ",mergeable=off"] {
        let (_guest, mapping) = started(memory);
        assert!(mapping.name.contains("berth-guest-ram"), "{mapping:?}");
        assert!(mapping.has("sh") && !mapping.has("mg"), "{mapping:?}");
        assert!(mapping.present_kib < SIZE_KIB / 2, "{mapping:?}");
    }
}

#[test]
fn private_memory_is_merged_only_on_demand() {
    if !has_kvm() {
        return;
    }
    for (memory, mergeable) in [
        (",shared=off", false),
        (",mergeable=on", false),
        (",mergeable=always", true),
    ] {
        let (_guest, mapping) = started(memory);
        assert_eq!(mapping.name, "", "{memory}");
        assert!(!mapping.has("sh"), "{memory} {mapping:?}");
        let ksm = fs::exists("/sys/kernel/mm/ksm").unwrap();
        assert_eq!(mapping.has("mg"), mergeable && ksm, "{memory} {mapping:?}");
    }
}

/// A guest of 192 MiB beside a disk: 128 MiB of it a file that the daemon gets, 64 MiB private.
#[test]
fn a_window_is_shared_and_the_rest_private() {
    if !has_kvm() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let socket = dir.as_path().join("disk.sock");
    let _disk = Stock::listen(&socket, Protocol::CONFIG | Protocol::REPLY_ACK);
    for (mergeable, merged) in [("on", false), ("always", true)] {
        let code = Code::new().print("here\n").halt();
        let disk = format!("--disk=socket={}", socket.display());
        let memory = format!("--memory=size=192M,mergeable={mergeable}");
        let guest = Guest::start_pvh(&code, &[&disk, &memory]);
        eventually("the guest runs", || {
            (guest.lines() == ["here"]).then_some(())
        });
        let mut mappings = not_dumped(guest.pid());
        mappings.sort_by_key(|mapping| mapping.kib);
        let [rest, window] = &mappings[..] else {
            panic!("{mappings:?}");
        };
        let ksm = fs::exists("/sys/kernel/mm/ksm").unwrap();
        assert_eq!((window.kib, rest.kib), (128 << 10, 64 << 10));
        assert!(window.has("sh") && !window.has("mg"), "{window:?}");
        assert!(window.name.contains("berth-guest-ram"), "{window:?}");
        assert!(!rest.has("sh"), "{rest:?}");
        assert_eq!(rest.has("mg"), merged && ksm, "{rest:?}");
        let counter = |name| guest.counter("memory", name);
        assert_eq!(counter("window_bytes"), Some(128 << 20));
        assert_eq!(counter("mergeable_bytes"), Some(64 << 20));
        // The boot structures are there, and not much else.
        let used = counter("window_used_bytes").unwrap();
        assert!((1..64 << 20).contains(&used), "{used}");
        let late = r#"{"vhost_user": true, "vhost_socket": "/nowhere", "dma": "window"}"#;
        let (status, answer) = guest.put("vm.add-disk", late);
        assert_eq!(status, 500, "{answer}");
        assert!(
            answer.contains("cannot be added while the guest runs with dma=window"),
            "{answer}"
        );
    }
}

#[test]
fn huge_pages_are_transparent_or_not_as_asked() {
    if !has_kvm() || !fs::exists("/sys/kernel/mm/transparent_hugepage").unwrap() {
        return;
    }
    for (thp, yes, no) in [("on", "hg", "nh"), ("off", "nh", "hg")] {
        let (_guest, mapping) = started(&format!(",shared=off,thp={thp}"));
        assert!(mapping.has(yes) && !mapping.has(no), "{thp} {mapping:?}");
    }
}

/// The device flushes single pages: one that were in a huge page would be back with its neighbours.
#[test]
fn with_the_test_device_no_page_is_in_a_huge_page() {
    if !has_kvm() || !fs::exists("/sys/kernel/mm/transparent_hugepage").unwrap() {
        return;
    }
    for memory in ["", ",thp=on", ",shared=off"] {
        let (_guest, mapping) = started_with(memory, &["--platform=test-device=on"]);
        assert!(mapping.has("nh"), "{memory} {mapping:?}");
    }
}

#[test]
fn prefaulted_memory_is_all_there() {
    if !has_kvm() {
        return;
    }
    for memory in [",prefault=on", ",prefault=on,shared=off"] {
        let (_guest, mapping) = started(memory);
        assert_eq!(mapping.present_kib, SIZE_KIB, "{memory} {mapping:?}");
    }
}

/// Of memory that is all there the host has huge pages where it may, and none where it may not.
#[test]
fn transparent_huge_pages_are_counted() {
    let enabled = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
    if !has_kvm() || enabled.is_ok_and(|enabled| enabled.contains("[never]")) {
        return;
    }
    let huge = |thp| {
        let (_guest, mapping) = started(&format!(",shared=off,prefault=on,thp={thp}"));
        assert_eq!(mapping.present_kib, SIZE_KIB, "{mapping:?}");
        mapping.huge_kib
    };
    assert_eq!(huge("off"), 0);
    // How many depends on what the host finds free.
    assert!(huge("on") > 0);
}

/// The host's pool of pages of 2 MiB; what it was is back when this is dropped.
struct Pool {
    before: u64,
    /// Locked, so that another run of this test waits and finds what was.
    _lock: fs::File,
}

impl Pool {
    const FILES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

    fn read(name: &str) -> Option<u64> {
        let text = fs::read_to_string(format!("{}/{name}", Self::FILES)).ok()?;
        text.trim().parse().ok()
    }

    /// None where the host has no such pages.
    fn found() -> Option<Self> {
        let lock = fs::File::open(format!("{}/nr_hugepages", Self::FILES)).ok()?;
        lock.lock().ok()?;
        Some(Self {
            before: Self::read("nr_hugepages")?,
            _lock: lock,
        })
    }

    fn has_free(pages: u64) -> bool {
        Self::read("free_hugepages").is_some_and(|free| free >= pages)
    }

    /// Whether there are so many free ones now: not where we may not, or the host finds no memory for them.
    fn grow(&self, pages: u64) -> bool {
        self.set(self.before + pages).is_ok() && Self::has_free(pages)
    }

    fn set(&self, pages: u64) -> std::io::Result<()> {
        fs::write(format!("{}/nr_hugepages", Self::FILES), pages.to_string())
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // There is nobody to tell.
        let _ = self.set(self.before);
    }
}

/// Where the host has reserved too few, the line says how to reserve them; where it has enough, the pages are huge.
#[test]
fn reserved_huge_pages_are_asked_for_and_used() {
    const PAGES: u64 = SIZE_KIB / 2048;
    if !has_kvm() {
        return;
    }
    let memories = [",hugepages=on", ",hugepages=on,shared=off"];
    let pool = Pool::found();
    for memory in memories {
        if Pool::has_free(PAGES) {
            continue;
        }
        let guest = Guest::none(&Code::new().halt());
        let kernel = guest.path("kernel");
        let output = run(&[
            "--kernel",
            kernel.to_str().unwrap(),
            "--serial=null",
            &format!("--memory=size=64M{memory}"),
        ]);
        let line = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{line}");
        assert_eq!(line.lines().count(), 1, "{line}");
        assert!(line.contains("vm.nr_hugepages=32"), "{line}");
    }
    if !pool.as_ref().is_some_and(|pool| pool.grow(PAGES)) {
        return;
    }
    for (memory, shared) in memories.into_iter().zip([true, false]) {
        let (_guest, mapping) = started(memory);
        assert_eq!(mapping.page_kib, 2048, "{mapping:?}");
        assert_eq!(mapping.has("sh"), shared, "{mapping:?}");
        assert_eq!(
            mapping.present_kib, 0,
            "of the pool, not resident: {mapping:?}"
        );
    }
}

#[test]
fn words_that_exclude_each_other_are_refused_in_one_line() {
    let disk = "--disk=socket=/nowhere,dma=window";
    for (memory, with_disk, expected) in [
        ("shared=on,mergeable=on", false, "mergeable=off"),
        ("hugepages=on,mergeable=on", false, "hugepages=off"),
        (
            "shared=off",
            true,
            "_disk0: dma=window is for --memory mergeable=on",
        ),
        ("window=256M", false, "window= is for mergeable=on"),
    ] {
        let memory = format!("--memory=size=64M,{memory}");
        let mut words = vec!["--kernel=/dev/null", "--serial=null", memory.as_str()];
        words.extend(with_disk.then_some(disk));
        let output = run(&words);
        let line = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{memory}: {line}");
        assert!(line.contains(expected), "{line}");
        assert_eq!(line.lines().count(), 1, "{line}");
    }
}
