//! The sandbox, from inside and from outside: what each kind of thread is refused, tried in processes of its own.
#![expect(unsafe_code, reason = "system calls that no wrapper makes")]
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot start its process has failed"
)]

mod support;

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, Output};

use berth_vmm::args;
use berth_vmm::sandbox::{self, Mode, Settings, ThreadKind};
use support::{Code, Guest, ask_with, eventually, has_kvm, vmm};
use vmm_sys_util::tempdir::TempDir;

const CHILD: &str = "BERTH_SANDBOX_CHILD";
const REFUSED: [&str; 5] = ["execve", "ptrace", "socket", "openat", "process_vm_readv"];

/// Not a test of its own: what the others start this binary for, with what to try in [`CHILD`].
#[test]
fn child() {
    let Ok(job) = std::env::var(CHILD) else {
        return;
    };
    let words: Vec<_> = job.split(' ').map(str::to_owned).collect();
    let [mode, kind, call] = words.try_into().unwrap();
    let mode = if mode == "log" { Mode::Log } else { Mode::On };
    if call == "files" {
        return only_the_guests_files_open(Path::new(&kind));
    }
    let settings = Settings {
        mode,
        ..Settings::default()
    };
    sandbox::prepare(&settings).unwrap();
    let kind = ThreadKind::ALL.into_iter().find(|of| of.name() == kind);
    let tried = sandbox::spawn(kind.unwrap(), "suspect", move || attempt(&call));
    eprintln!("went on: {:?}", tried.unwrap().join().unwrap());
}

/// Makes a system call that no thread, or only one that opens files, needs.
fn attempt(call: &str) -> Result<i64, Option<i32>> {
    let path = c"/dev/null".as_ptr();
    let null = std::ptr::null::<libc::c_void>();
    // SAFETY: the path is a string; null and the numbers are what these calls take, and all fail or do no harm.
    let result = unsafe {
        match call {
            "execve" => libc::syscall(libc::SYS_execve, c"/nowhere/program".as_ptr(), null, null),
            "ptrace" => libc::syscall(libc::SYS_ptrace, libc::PTRACE_ATTACH, 0, 0, 0),
            "socket" => libc::syscall(libc::SYS_socket, libc::AF_INET, libc::SOCK_DGRAM, 0),
            "openat" => libc::syscall(libc::SYS_openat, libc::AT_FDCWD, path, libc::O_RDWR),
            "process_vm_readv" => libc::syscall(libc::SYS_process_vm_readv, 1, null, 0, null, 0, 0),
            "mprotect" => libc::syscall(libc::SYS_mprotect, null, 0, libc::PROT_EXEC),
            "getpid" => libc::syscall(libc::SYS_getpid),
            other => panic!("no call {other}"),
        }
    };
    match result {
        -1 => Err(io::Error::last_os_error().raw_os_error()),
        number => Ok(number),
    }
}

/// Runs [`child`] in a process of its own.
fn in_child(job: &str) -> Output {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture"])
        .env(CHILD, job)
        .output()
        .unwrap()
}

#[test]
fn what_a_thread_does_not_need_ends_the_process_and_is_named() {
    for kind in ThreadKind::ALL {
        let opens = matches!(kind, ThreadKind::Main | ThreadKind::Boot);
        let calls = REFUSED.iter().filter(|call| !(opens && **call == "openat"));
        for call in calls.chain(&["mprotect"]) {
            let output = in_child(&format!("on {} {call}", kind.name()));
            let stderr = String::from_utf8_lossy(&output.stderr);
            let signal = output.status.signal();
            assert_eq!(signal, Some(libc::SIGSYS), "{kind:?} {call}: {stderr}");
            let line = format!("sandbox: thread suspect made system call {call} (");
            let lines = stderr.lines().filter(|text| text.starts_with(&line));
            assert_eq!(lines.count(), 1, "{kind:?}: {stderr}");
        }
    }
}

#[test]
fn what_a_thread_needs_goes_on_and_log_refuses_nothing() {
    for (job, result) in [
        ("on vcpuN getpid", "Ok("),
        ("on boot openat", "Ok("),
        ("log rng socket", "Ok("),
        ("log vcpuN execve", "Err(Some(2))"),
    ] {
        let output = in_child(job);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{job}: {stderr}");
        assert!(
            stderr.contains(&format!("went on: {result}")),
            "{job}: {stderr}"
        );
    }
}

#[test]
fn landlock_opens_what_the_configuration_and_the_rules_name() {
    let lsm = fs::read_to_string("/sys/kernel/security/lsm");
    if lsm.is_ok_and(|names| !names.contains("landlock")) {
        eprintln!("skipped: no Landlock in this kernel");
        return;
    }
    let dir = TempDir::new().unwrap();
    let folder = dir.as_path().join("later");
    fs::create_dir(&folder).unwrap();
    for name in ["kernel", "secret", "later/file"] {
        fs::write(dir.as_path().join(name), name).unwrap();
    }
    let output = in_child(&format!("on {} files", dir.as_path().display()));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    assert!(stderr.contains("files are confined"), "{stderr}");
}

/// The other half of it, in the child.
fn only_the_guests_files_open(dir: &Path) {
    let at = |name: &str| dir.join(name);
    let words = format!(
        "berth-vmm --kernel {} --serial null --landlock-rules path={},access=r",
        at("kernel").display(),
        at("later").display()
    );
    let options = args::parse(words.split(' ').map(Into::into)).unwrap();
    sandbox::prepare(&options.sandbox).unwrap();
    sandbox::confine(options.config.as_ref(), &[dir.join("api/socket")]).unwrap();
    assert_eq!(fs::read(at("kernel")).unwrap(), b"kernel");
    assert_eq!(fs::read(at("later/file")).unwrap(), b"later/file");
    let refused = |result: io::Result<()>| {
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    };
    refused(fs::read(at("secret")).map(drop));
    refused(fs::write(at("kernel"), "changed"));
    refused(fs::write(at("later/file"), "changed"));
    refused(fs::write(at("new"), ""));
    refused(fs::remove_file(at("secret")));
    eprintln!("files are confined");
}

#[test]
fn wrong_words_are_usage() {
    for (words, part) in [
        (
            &["--sandbox", "maybe"][..],
            "--sandbox: unknown value 'maybe'",
        ),
        (&["--seccomp", "on"], "expected true, false or log"),
        (&["--sandbox=on", "--seccomp=true"], "give one of them"),
        (&["--landlock-rules", "path=/"], "access= is missing"),
    ] {
        let output = vmm().args(["--kernel", "/k"]).args(words).output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(
            stderr.contains(part) && stderr.lines().count() == 1,
            "{stderr}"
        );
    }
    if has_kvm() {
        let rule = [
            "--landlock-rules",
            "path=/nowhere,access=r",
            "--serial=null",
        ];
        let output = vmm().args(["--kernel", "/k"]).args(rule).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert!(stderr.contains("cannot open /nowhere"), "{stderr}");
    }
}

#[test]
fn every_thread_of_a_running_guest_is_confined() {
    if !has_kvm() {
        return;
    }
    let guest = Guest::start_with(&Code::new().print("on\n").halt(), &["--cpus", "boot=2"]);
    eventually("the guest runs", || (guest.lines() == ["on"]).then_some(()));
    let tasks = format!("/proc/{}/task", guest.pid());
    let mut names = Vec::new();
    for task in fs::read_dir(tasks).unwrap() {
        let path = task.unwrap().path();
        // A thread may have ended meanwhile.
        let Ok(status) = fs::read_to_string(path.join("status")) else {
            continue;
        };
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or_default().trim().to_owned()
        };
        assert_eq!(field("NoNewPrivs:"), "1", "{status}");
        assert_eq!(field("Seccomp:"), "2", "{status}");
        let capabilities = u64::from_str_radix(&field("CapEff:"), 16).unwrap();
        assert_eq!(capabilities & !(0b110 | 1 << 38), 0, "{status}");
        names.push(field("Name:"));
    }
    for name in ["api", "serial-out", "vcpu0", "vcpu1"] {
        assert!(names.iter().any(|of| of == name), "no {name}: {names:?}");
    }
}

#[test]
fn an_ordinary_user_boots_a_guest() {
    if !has_kvm() {
        return;
    }
    let device = fs::metadata("/dev/kvm").unwrap();
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.as_path().join(name);
    fs::set_permissions(dir.as_path(), Permissions::from_mode(0o755)).unwrap();
    fs::write(at("kernel"), Code::new().print("hello\n").power_off().elf()).unwrap();
    let mut command = vmm();
    let root = fs::metadata("/proc/self").unwrap().uid() == 0;
    if root {
        // Where the binary lies may be closed to others; /dev/kvm belongs to a group.
        fs::copy(env!("CARGO_BIN_EXE_berth-vmm"), at("berth-vmm")).unwrap();
        chown(dir.as_path(), Some(65534), Some(device.gid())).unwrap();
        command = Command::new(at("berth-vmm"));
        command
            .uid(65534)
            .gid(device.gid())
            .stdin(std::process::Stdio::null());
    }
    let output = command
        .args([
            "--kernel",
            &at("kernel").display().to_string(),
            "--memory",
            "32M",
        ])
        .args(["--serial", &format!("file={}", at("serial").display())])
        .args(["--api-socket", &format!("path={}", at("api").display())])
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    assert_eq!(fs::read(at("serial")).unwrap(), b"hello\n");
    assert!(!at("api").exists(), "the socket is left behind");
}

#[test]
fn a_backend_that_is_to_connect_finds_a_socket_each_time() {
    if !has_kvm() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("net");
    let net = format!("vhost_user=on,vhost_mode=server,socket={}", path.display());
    let guest = Guest::start_with(&Code::new().halt(), &["--net", &net]);
    for _ in 0..3 {
        // Each one hangs up before it says a word.
        drop(eventually("the socket", || UnixStream::connect(&path).ok()));
    }
    assert_eq!(guest.api("PUT", "vm.shutdown").0, 204);
    eventually("the socket is removed", || (!path.exists()).then_some(()));
    assert_eq!(guest.api("PUT", "vmm.shutdown").0, 204);
    let (status, stderr) = guest.wait();
    assert_eq!(status, 0, "{stderr}");
}

#[test]
fn a_guest_that_comes_later_needs_a_rule_for_its_kernel_and_no_more() {
    if !has_kvm() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.as_path().join(name).display().to_string();
    for name in ["kernel", "other"] {
        fs::write(at(name), Code::new().halt().elf()).unwrap();
    }
    let mut child = vmm()
        .args(["--api-socket", &format!("path={}", at("api"))])
        .args([
            "--landlock-rules",
            &format!("path={},access=r", at("kernel")),
        ])
        .spawn()
        .unwrap();
    let put = |name: &str, body: &str| {
        let stream = eventually("the API", || UnixStream::connect(at("api")).ok());
        ask_with(stream, "PUT", name, body)
    };
    for (kernel, booted) in [("other", 500), ("kernel", 204)] {
        let body = format!(r#"{{"payload": {{"kernel": "{}"}}}}"#, at(kernel));
        assert_eq!(put("vm.create", &body).0, 204);
        let (status, body) = put("vm.boot", "");
        assert_eq!(status, booted, "{kernel}: {body}");
        assert_eq!(put("vm.delete", "").0, 204);
    }
    assert_eq!(put("vmm.shutdown", "").0, 204);
    assert!(child.wait().unwrap().success());
}
