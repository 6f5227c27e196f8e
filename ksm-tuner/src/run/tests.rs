//! The daemon over a tree of files and a VM of our own making.

use super::*;
use std::fs;

use crate::testing::Folder;

#[test]
fn a_wrong_configuration_is_refused_and_a_right_one_taken() {
    let folder = Folder::new();
    let path = folder.path().join("tuner.toml");
    let options = Options {
        config: Some(path.clone()),
        vms: Some("/elsewhere".into()),
        run_dir: None,
        dry_run: true,
        metrics_socket: None,
        record: None,
    };
    assert!(load(&options).is_err());
    fs::write(
        &path,
        "[merge]\ndomain = \"farm\"\n[general]\nvms = \"/x\"\n",
    )
    .unwrap();
    let config = load(&options).unwrap();
    assert_eq!(config.merge.domain.as_deref(), Some("farm"));
    assert_eq!(config.general.vms, Path::new("/elsewhere"));
}

#[test]
fn questions_are_answered_over_the_socket() {
    let folder = Folder::new();
    let published = Arc::new(Mutex::new(Published::default()));
    published.lock().unwrap().status.saved_mib = 42;
    let served = serve::control(folder.path(), Arc::clone(&published)).unwrap();
    let text = ask(folder.path(), &Question::Status).unwrap();
    let status: report::Status = serde_json::from_str(&text).unwrap();
    assert_eq!(status.saved_mib, 42);
    assert_eq!(ask(folder.path(), &Question::Explain(5)).unwrap(), "[]\n");
    let taken = serve::control(folder.path(), published).unwrap_err();
    assert_eq!(taken.kind(), io::ErrorKind::AddrInUse);
    drop(served);
    assert!(!control_path(folder.path()).exists());
}

#[test]
fn metrics_are_served_plainly_and_over_http() {
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    let folder = Folder::new();
    let path = folder.path().join("metrics");
    let _served = serve::metrics(&path, Arc::default()).unwrap();
    let ask = |request: &str| {
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    };
    assert!(ask("").starts_with("berth_tuner_state{"));
    let http = ask("GET /metrics HTTP/1.1\r\n\r\n");
    assert!(http.starts_with("HTTP/1.0 200 OK\r\n"), "{http}");
    assert!(
        http.ends_with("berth_tuner_memory_waiting_percent 0\n"),
        "{http}"
    );
}

/// A host of files, and a VM of the domain that says of all its memory that it has equals.
struct Host {
    folder: Folder,
    /// First lines of what the VM was asked to do.
    asked: Arc<Mutex<Vec<String>>>,
}

const KSM: [(&str, &str); 10] = [
    ("run", "0"),
    ("pages_to_scan", "100"),
    ("sleep_millisecs", "20"),
    ("pages_shared", "0"),
    ("pages_sharing", "0"),
    ("pages_unshared", "0"),
    ("pages_volatile", "0"),
    ("full_scans", "0"),
    ("use_zero_pages", "0"),
    ("max_page_sharing", "256"),
];

impl Host {
    fn new() -> Self {
        let folder = Folder::new();
        let ksm = folder.path().join("sys/kernel/mm/ksm");
        fs::create_dir_all(&ksm).unwrap();
        for (name, value) in KSM {
            fs::write(ksm.join(name), value).unwrap();
        }
        for name in ["proc/pressure", "vms"] {
            fs::create_dir_all(folder.path().join(name)).unwrap();
        }
        let meminfo = "MemTotal: 8000000 kB\nMemAvailable: 7000000 kB\nSwapFree: 0 kB\n";
        for (name, text) in [
            ("proc/meminfo", meminfo),
            ("proc/vmstat", "cow_ksm 0\n"),
            ("proc/stat", "cpu 1\ncpu0 1\n"),
            ("proc/pressure/memory", "some avg10=0.00 total=0\n"),
            ("proc/pressure/cpu", "some avg10=0.00 total=0\n"),
            ("tuner.toml", "[merge]\ndomain = \"farm\"\n"),
        ] {
            fs::write(folder.path().join(name), text).unwrap();
        }
        let asked = Arc::new(Mutex::new(Vec::new()));
        serve_vm(&folder.path().join("vms/a.sock"), Arc::clone(&asked));
        Self { folder, asked }
    }

    /// The files of the kernel: what they hold, and when they were last written.
    fn files(&self) -> Vec<(String, SystemTime)> {
        let ksm = self.folder.path().join("sys/kernel/mm/ksm");
        KSM.iter()
            .map(|(name, _)| {
                let path = ksm.join(name);
                let changed = fs::metadata(&path).unwrap().modified().unwrap();
                (fs::read_to_string(path).unwrap(), changed)
            })
            .collect()
    }

    /// Runs a tuner until it has had the VM's pages compared and acted on that, and ends it.
    fn run(&self, dry_run: bool) -> Vec<String> {
        let folder = self.folder.path();
        let options = Options {
            config: Some(folder.join("tuner.toml")),
            vms: Some(folder.join("vms")),
            run_dir: Some(folder.join("run")),
            dry_run,
            metrics_socket: None,
            record: None,
        };
        let roots = Roots {
            proc: folder.join("proc"),
            sys: folder.join("sys"),
            cgroup: None,
        };
        let (sender, events) = channel();
        let config = load(&options).unwrap();
        let mut tuner = Tuner::new(options, config, roots, sender).unwrap();
        tuner.step();
        match events.recv_timeout(Duration::from_secs(60)).unwrap() {
            Event::Hashed(hashed) => tuner.hashed(*hashed),
            _ => panic!("no hashes"),
        }
        // Offers, sees that it did, and has it scanned.
        tuner.step();
        tuner.step();
        let said = tuner.published.lock().unwrap().last(10);
        tuner.end();
        said.iter().map(report::explanation).collect()
    }
}

/// Answers until the folder is gone; notes every PUT but that for hashes.
fn serve_vm(path: &Path, asked: Arc<Mutex<Vec<String>>>) {
    use std::io::Read;
    let listener = std::os::unix::net::UnixListener::bind(path).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let mut request = Vec::new();
            let mut byte = [0];
            while !request.ends_with(b"\r\n\r\n")
                && stream.read(&mut byte).is_ok_and(|read| read == 1)
            {
                request.push(byte[0]);
            }
            let request = String::from_utf8_lossy(&request).into_owned();
            let length = request
                .lines()
                .find_map(|line| line.strip_prefix("Content-Length: "));
            let mut body = vec![0; length.map_or(0, |length| length.parse().unwrap())];
            let _ = stream.read_exact(&mut body);
            let body = String::from_utf8_lossy(&body).into_owned();
            let line = request.lines().next().unwrap_or_default();
            let mut asked = asked.lock().unwrap();
            if line.contains("vm.memory-advice") || line.contains("vm.resize") {
                asked.push(body);
            }
            let offers = asked
                .last()
                .is_some_and(|last| !last.contains("unmergeable"));
            let offered = if offers {
                r#"{"start": 0, "len": 2097152}"#
            } else {
                ""
            };
            let answer = match line.split(' ').nth(1).unwrap_or_default().rsplit('/').next() {
                Some("vmm.ping") => r#"{"version": "1", "pid": 4000000}"#.to_owned(),
                Some("vm.info") => r#"{"config": {"cpus": {"boot_vcpus": 1, "max_vcpus": 1},
                    "memory": {"size": 2097152}}, "state": "Running"}"#
                    .to_owned(),
                Some("vm.memory-sample") if line.starts_with("GET") => format!(
                    r#"{{"trust_domain": "farm", "mergeable": [{{"start": 0, "len": 2097152}}], "offered": [{offered}]}}"#
                ),
                Some("vm.memory-sample") => {
                    r#"{"extents": [{"start": 0, "len": 2097152, "present": 512, "hashes": [7, 7, 7, 7]}]}"#.to_owned()
                }
                _ => String::new(),
            };
            let head = format!(
                "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n",
                answer.len()
            );
            // A client that has gone is its own concern.
            let _ = stream.write_all((head + &answer).as_bytes());
        }
    });
}

#[test]
fn a_dry_run_says_what_it_would_do_and_changes_nothing() {
    let host = Host::new();
    let before = host.files();
    let said = host.run(true).concat();
    assert!(said.contains("offer 1 runs of a"), "{said}");
    assert_eq!(host.files(), before);
    assert_eq!(*host.asked.lock().unwrap(), [""; 0]);
    assert!(!host.folder.path().join("run").exists());
}

#[test]
fn what_was_done_is_undone_at_the_end() {
    let host = Host::new();
    let before = host.files();
    let said = host.run(false).concat();
    for part in ["offer 1 runs of a", "scanner runs"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let asked = host.asked.lock().unwrap().clone();
    assert_eq!(asked.len(), 2, "{asked:?}");
    assert!(
        asked[0].contains(r#""mergeable""#) && asked[1].contains(r#""unmergeable""#),
        "{asked:?}"
    );
    let (values, times): (Vec<_>, Vec<_>) = host.files().into_iter().unzip();
    let (old, old_times): (Vec<_>, Vec<_>) = before.into_iter().unzip();
    assert_eq!(values, old);
    assert_ne!(times, old_times, "they were written to");
    assert!(!host.folder.path().join("run/state.json").exists());
}
