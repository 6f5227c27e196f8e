//! What a running VMM says about itself: events, metrics, the startup trace, where its vCPUs run.
#![expect(unsafe_code, reason = "clearing FD_CLOEXEC has no safe wrapper")]
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot start its process has failed"
)]

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use support::daemons::{has_daemons, image};
use support::{Code, Guest, eventually, has_kvm, run};

/// Names of events, `source.event`, once the last one is there.
fn events(guest: &Guest, file: &str, last: &str) -> Vec<String> {
    eventually(last, || {
        let text = std::fs::read_to_string(guest.path(file)).unwrap_or_default();
        let values = text.split("\n\n").filter(|text| !text.is_empty());
        // The last one may be half written.
        let values = values.map_while(|text| serde_json::from_str::<serde_json::Value>(text).ok());
        let name = |event: &serde_json::Value| {
            assert!(event["timestamp"]["secs"].is_u64() && event["timestamp"]["nanos"].is_u64());
            assert!(event["properties"].is_null());
            format!("{}.{}", event["source"].as_str()?, event["event"].as_str()?).into()
        };
        let names: Vec<String> = values.filter_map(|event| name(&event)).collect();
        names.iter().any(|name| name == last).then_some(names)
    })
}

#[test]
fn events_tell_the_life_of_a_guest() {
    if !has_kvm() {
        return;
    }
    let dir = vmm_sys_util::tempdir::TempDir::new().unwrap();
    let path = dir.as_path().join("events").display().to_string();
    let guest = Guest::start_with(
        &Code::new().print("boot\n").halt(),
        &["--event-monitor", &format!("path={path}")],
    );
    events(&guest, &path, "vm.booted");
    for request in [
        "vm.pause",
        "vm.resume",
        "vm.reboot",
        "vm.shutdown",
        "vm.boot",
    ] {
        assert_eq!(guest.api("PUT", request).0, 204, "{request}");
    }
    assert_eq!(guest.api("PUT", "vmm.shutdown").0, 204);
    let names = events(&guest, &path, "vmm.shutdown");
    let expected = [
        "vmm.starting",
        "vm.booting",
        "vm.booted",
        "vm.pausing",
        "vm.paused",
        "vm.resuming",
        "vm.resumed",
        "vm.rebooting",
        "vm.rebooted",
        "vm.shutdown",
        "vm.booting",
        "vm.booted",
        "vm.shutdown",
        "vm.deleted",
        "vmm.shutdown",
    ];
    assert_eq!(names, expected);
}

/// Reads events from a FIFO until that one; of each the name, `id` and `bdf`.
fn read_until(fifo: &mut File, last: &str) -> Vec<String> {
    let mut text = String::new();
    eventually(last, || {
        let mut bytes = [0; 4096];
        // EAGAIN while there is nothing, and 0 where nobody writes, which would be a fault here.
        if let Ok(count) = fifo.read(&mut bytes) {
            assert_ne!(count, 0, "the VMM has let go of the FIFO");
            text.push_str(std::str::from_utf8(&bytes[..count]).unwrap());
        }
        let (whole, _) = text.rsplit_once("\n\n")?;
        let names: Vec<String> = whole.split("\n\n").map(in_short).collect();
        let is_last = |name: &String| name.split(' ').next() == Some(last);
        names.iter().any(is_last).then_some(names)
    })
}

fn in_short(event: &str) -> String {
    let event: serde_json::Value = serde_json::from_str(event).unwrap();
    let properties = &event["properties"];
    let parts = [&event["event"], &properties["id"], &properties["bdf"]];
    let words: Vec<_> = parts.iter().filter_map(|part| part.as_str()).collect();
    words.join(" ")
}

fn fifo_reader(path: &Path) -> File {
    let mut options = File::options();
    options.read(true).custom_flags(libc::O_NONBLOCK);
    options.open(path).unwrap()
}

#[test]
fn a_reader_of_a_fifo_comes_late_goes_and_comes_back() {
    if !has_kvm() {
        return;
    }
    let dir = vmm_sys_util::tempdir::TempDir::new().unwrap();
    let path = dir.as_path().join("events");
    assert!(
        Command::new("mkfifo")
            .arg(&path)
            .status()
            .unwrap()
            .success()
    );
    let guest = Guest::start_with(
        &Code::new().print("boot\n").halt(),
        &["--event-monitor", &format!("path={}", path.display())],
    );
    // Nobody reads, and nobody waits for that.
    eventually("the guest runs", || {
        (guest.state() == "Running").then_some(())
    });
    let mut reader = fifo_reader(&path);
    let names = read_until(&mut reader, "booted");
    assert_eq!(names, ["starting", "booting", "booted"], "kept for it");
    drop(reader);
    // SIGPIPE or an error would end the VMM, or the events, here.
    assert_eq!(guest.api("PUT", "vm.pause").0, 204);
    let mut reader = fifo_reader(&path);
    assert_eq!(read_until(&mut reader, "paused"), ["pausing", "paused"]);
    assert_eq!(guest.api("PUT", "vm.resume").0, 204);
    assert_eq!(read_until(&mut reader, "resumed"), ["resuming", "resumed"]);
    // More than a FIFO holds while nobody reads: the first are kept, and the VMM goes on.
    drop(reader);
    for _ in 0..400 {
        assert_eq!(guest.api("PUT", "vm.pause").0, 204);
        assert_eq!(guest.api("PUT", "vm.resume").0, 204);
    }
    let mut reader = fifo_reader(&path);
    let names = read_until(&mut reader, "resumed");
    assert_eq!(names[..2], ["pausing", "paused"]);
    assert_eq!(guest.state(), "Running");
}

#[test]
fn events_tell_of_devices_that_come_and_go() {
    if !has_daemons() {
        return;
    }
    let dir = vmm_sys_util::tempdir::TempDir::new().unwrap();
    let path = dir.as_path().join("events");
    File::create(&path).unwrap();
    let disk = image(&dir.as_path().join("image")).replace("path=", "");
    // It gives no power to what comes, which may be taken out at once then.
    let guest = Guest::start_with(
        &Code::new().halt(),
        &["--event-monitor", &format!("path={}", path.display())],
    );
    eventually("the guest runs", || {
        (guest.state() == "Running").then_some(())
    });
    let body = format!(r#"{{"path": "{disk}", "id": "data"}}"#);
    assert_eq!(guest.put("vm.add-disk", &body).0, 200);
    assert_eq!(guest.put("vm.remove-device", r#"{"id": "data"}"#).0, 204);
    let mut file = File::open(&path).unwrap();
    let mut text = String::new();
    let names = eventually("device-removed", || {
        file.read_to_string(&mut text).unwrap();
        let (whole, _) = text.rsplit_once("\n\n")?;
        let names: Vec<_> = whole.split("\n\n").map(in_short).collect();
        names.last()?.starts_with("device-removed").then_some(names)
    });
    let expected = [
        "starting",
        "booting",
        "booted",
        "connected data",
        "device-added data 0000:01:00.0",
        "device-removed data 0000:01:00.0",
    ];
    assert_eq!(names, expected);
}

#[test]
fn a_reader_of_events_that_does_not_read_holds_up_nobody_and_is_counted() {
    if !has_kvm() {
        return;
    }
    let (ours, theirs) = UnixStream::pair().unwrap();
    // Full from the start.
    theirs.set_nonblocking(true).unwrap();
    while (&theirs).write(&[b' '; 4096]).is_ok() {}
    let fd = inheritable(&theirs);
    let dir = vmm_sys_util::tempdir::TempDir::new().unwrap();
    let socket = dir.as_path().join("metrics").display().to_string();
    let guest = Guest::start_with(
        &Code::new().print("boot\n").out8(0xcf9, 6).halt(),
        &[
            "--event-monitor",
            &format!("fd={fd}"),
            "--metrics-socket",
            &socket,
        ],
    );
    eventually("ten boots", || (guest.lines().len() >= 10).then_some(()));
    let text = metrics(&socket, "");
    assert!(sample(&text, "berth_vmm_events_dropped_total") >= 10);
    drop(ours);
}

/// The descriptor, to stay open in a program that is started.
fn inheritable(stream: &UnixStream) -> i32 {
    let fd = stream.as_raw_fd();
    // SAFETY: integers only, and the descriptor is open.
    assert_eq!(unsafe { libc::fcntl(fd, libc::F_SETFD, 0) }, 0);
    fd
}

fn metrics(path: &str, request: &str) -> String {
    let mut stream = eventually("metrics", || UnixStream::connect(path).ok());
    stream.write_all(request.as_bytes()).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

fn sample(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let value = line.and_then(|rest| rest.trim().parse().ok());
    value.unwrap_or_else(|| panic!("no {name} in\n{text}"))
}

#[test]
fn metrics_count_what_the_guest_does() {
    if !has_kvm() {
        return;
    }
    let dir = vmm_sys_util::tempdir::TempDir::new().unwrap();
    let path = dir.as_path().join("metrics").display().to_string();
    let guest = Guest::start_with(
        &Code::new().out8(0x3f8, b'.').again(),
        &["--metrics-socket", &path],
    );
    let name = "berth_vmm_vcpu_exits_total{vcpu=\"0\",reason=\"io_out\"}";
    eventually("exits", || {
        let text = metrics(&path, "");
        (text.contains(name) && sample(&text, name) > 0).then_some(())
    });
    let text = metrics(&path, "GET /metrics HTTP/1.1\r\n\r\n");
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.0 200 OK\r\n"), "{head}");
    assert_eq!(sample(body, "berth_vmm_state{state=\"running\"}"), 1);
    assert_eq!(sample(body, "berth_vmm_guest_memory_bytes"), 32 << 20);
    assert!(sample(body, "berth_vmm_resident_bytes") > 0);
    assert_eq!(guest.api("PUT", "vmm.shutdown").0, 204);
    assert_eq!(guest.wait().0, 0);
    assert!(!std::path::Path::new(&path).exists(), "the socket is left");
}

#[test]
fn the_startup_trace_names_each_step_once() {
    if !has_kvm() {
        return;
    }
    let code = Code::new().print("boot\n").power_off();
    let (status, stderr) = Guest::start_with(&code, &["--startup-trace"]).wait();
    assert_eq!(status, 0, "{stderr}");
    for step in [
        "program loaded",
        "guest memory",
        "kernel loaded",
        "vcpu0 at KVM_RUN",
    ] {
        let lines = stderr.lines().filter(|line| line.contains(step));
        assert_eq!(lines.count(), 1, "{step}: {stderr}");
    }
}

#[test]
fn vcpus_run_where_they_are_told_to() {
    if !has_kvm() {
        return;
    }
    let allowed = std::fs::read_to_string("/proc/self/status").unwrap();
    let allowed = allowed
        .lines()
        .find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    let first = allowed
        .unwrap()
        .trim()
        .split([',', '-'])
        .next()
        .unwrap()
        .to_owned();
    let cpus = format!("boot=2,affinity=[1@[{first}]]");
    let guest = Guest::start_with(&Code::new().print("on\n").halt(), &["--cpus", &cpus]);
    eventually("the guest runs", || (guest.lines() == ["on"]).then_some(()));
    let read = |task: &std::path::Path, name: &str| {
        let mut text = String::new();
        let file = File::open(task.join(name));
        file.and_then(|mut file| file.read_to_string(&mut text))
            .ok()?;
        Some(text)
    };
    let kept = format!("Cpus_allowed_list:\t{first}\n");
    // The second vCPU starts in its own time, and has its name from itself.
    eventually("vcpu1 where it is told to be", || {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", guest.pid())).unwrap();
        let mut paths = tasks.filter_map(|task| Some(task.ok()?.path()));
        let vcpu = paths.find(|task| read(task, "comm").is_some_and(|name| name.trim() == "vcpu1"));
        read(&vcpu?, "status")?.contains(&kept).then_some(())
    });
    let (_, body) = guest.api("GET", "vm.info");
    let info: serde_json::Value = serde_json::from_str(&body).unwrap();
    let expected = serde_json::json!([{"vcpu": 1, "host_cpus": [first.parse::<u64>().unwrap()]}]);
    assert_eq!(info["config"]["cpus"]["affinity"], expected);

    let absent = "boot=1,affinity=[0@[1023]]";
    let output = run(&["--kernel", "/k", "--serial=null", "--cpus", absent]);
    assert_eq!(output.status.code(), Some(1));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.contains("CPU 1023 is not on this host"), "{stderr}");
    assert_eq!(stderr.lines().count(), 1);
}
