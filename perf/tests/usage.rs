//! The program as people run it: what it refuses and how, and what a run leaves behind. No speed is
//! looked at here.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const TIMEOUT: Duration = Duration::from_secs(60);

/// A directory that goes away with the test.
struct TempDir(PathBuf);

impl TempDir {
    fn new() -> TempDir {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("perf-usage-{}-{n}", std::process::id());
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        fs::create_dir(&path).unwrap();
        TempDir(path)
    }

    fn entries(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.0).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn bench(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_berth-perf"));
    command.args(args).stdin(Stdio::null());
    command
}

/// Exit code and what it said.
fn refused(args: &[&str]) -> (Option<i32>, String) {
    let Output { status, stderr, .. } = bench(args).output().unwrap();
    (status.code(), String::from_utf8(stderr).unwrap())
}

/// A run that needs no privilege, no daemon and no io_uring. Whatever file is called berth-blk is not asked for.
fn small_run(dir: &TempDir, out: &TempDir, run_ms: &str, more: &[&str]) -> Command {
    let build = out.0.join("build");
    fs::create_dir_all(&build).unwrap();
    fs::write(build.join("berth-blk"), "").unwrap();
    let mut command = bench(&[
        "run",
        "blk",
        "--cell=cache-randread-4k-qd1",
        "--limit=loop-pread",
        "--subject=loop-pread",
        "--against=none",
        "--client-cpu=0",
        "--daemon-cpu=0",
        "--file-mib=16",
        "--no-counts",
    ]);
    command
        .arg(format!("--builds={}", build.display()))
        .arg(format!("--run-ms={run_ms}"))
        .arg(format!("--dir={}", dir.0.display()))
        .arg(format!("--out={}", out.0.display()))
        .args(more);
    command
}

fn results(out: &TempDir) -> serde_json::Value {
    let text = fs::read_to_string(out.0.join("results.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn wait_for(what: &str, there: &dyn Fn() -> bool) {
    let deadline = Instant::now() + TIMEOUT;
    while !there() {
        assert!(Instant::now() < deadline, "{what}");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn what_is_not_there_is_refused_in_one_line_with_the_nearest_name() {
    for (args, nearest) in [
        (
            &["run", "bkl"][..],
            "no scenario 'bkl': did you mean 'blk'?",
        ),
        (
            &["run", "--without=net,bot"],
            "no scenario 'bot': did you mean 'boot'?",
        ),
        (
            &["run", "--against=qemu-storage"],
            "no peer 'qemu-storage': did you mean 'qemu-storage-daemon'?",
        ),
        (
            &["run", "--peer=firecraker=/bin/fc"],
            "no peer 'firecraker': did you mean 'firecracker'?",
        ),
        (
            &["run", "blk", "--cell=zram-qd2"],
            "no cell 'zram-qd2': did you mean 'zram-",
        ),
        (
            &["run", "blk", "--cell=file", "--quick"],
            "--quick has none of these cells",
        ),
    ] {
        let (code, text) = refused(args);
        assert_eq!(code, Some(2), "{args:?}: {text}");
        assert!(text.contains(nearest), "{args:?}: {text}");
        assert_eq!(text.lines().count(), 1, "{text}");
    }
}

#[test]
fn wrong_usage_is_exit_code_2() {
    for args in [
        &["run", "--daemon-cpu=4096"][..],
        &["run", "--variant=--poll-us=0"],
        &["run", "--run-ms=1"],
        &["run", "--peer=fio"],
        &["compare", "one"],
        &[],
    ] {
        assert_eq!(refused(args).0, Some(2), "{args:?}");
    }
}

#[test]
fn a_run_that_is_not_there_cannot_be_shown() {
    let (code, text) = refused(&["report", "/nowhere/run"]);
    assert_eq!(code, Some(1));
    assert!(text.contains("cannot read /nowhere/run"), "{text}");
    let out = TempDir::new();
    fs::write(out.0.join("results.json"), "{}").unwrap();
    let path = out.0.to_string_lossy().into_owned();
    let (code, text) = refused(&["compare", &path, &path]);
    assert_eq!(code, Some(1));
    assert!(text.contains("is not a result of berth-perf"), "{text}");
}

#[test]
fn help_has_examples_and_the_list_says_who_is_there() {
    let output = bench(&["--help"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("Examples:") && text.contains("--builds /tmp/before,target/release"));
    let output = bench(&["list", "--peer=fio=/somewhere/fio"])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains("zram-randread-4k-qd1") && text.contains("/somewhere/fio"),
        "{text}"
    );
    let output = bench(&["list", "--json"]).output().unwrap();
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["scenarios"][0]["name"], "blk");
}

#[test]
fn a_run_prints_tables_writes_results_and_leaves_nothing_else() {
    let (dir, out) = (TempDir::new(), TempDir::new());
    let output = small_run(&dir, &out, "60", &["--rounds=2"])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{error}");
    assert!(
        text.contains("cache 4k randread QD1, client sleeps"),
        "{text}"
    );
    assert!(error.contains("[blk   2/2] 0:00 left"), "{error}");
    let json = results(&out);
    let cell = &json["scenarios"][0]["cells"][0];
    assert_eq!(cell["series"][0]["subject"], "loop-pread");
    assert_eq!(
        cell["series"][0]["samples"]["rate"]
            .as_array()
            .unwrap()
            .len(),
        2
    );
    assert_eq!(cell["series"][0]["ratio"]["rate"]["median"], 1.0);
    // Cloud Hypervisor's shape.
    let figure = &json["results"][0];
    assert_eq!(figure["name"], "blk_cache-randread-4k-qd1_rate@loop-pread");
    for key in ["mean", "std_dev", "max", "min"] {
        assert!(figure[key].as_f64().unwrap() >= 0.0, "{key}");
    }
    for key in [
        "git_human_readable",
        "git_revision",
        "git_commit_date",
        "date",
    ] {
        assert!(json[key].is_string(), "{key}");
    }
    assert!(!json["host"]["kernel"].as_str().unwrap().is_empty());
    assert_eq!(json["noise"].as_array().unwrap().len(), 2);
    let page = fs::read_to_string(out.0.join("report.html")).unwrap();
    assert!(page.starts_with("<!doctype html>") && page.contains("loop-pread"));
    assert_eq!(dir.entries(), Vec::<PathBuf>::new());
    let path = out.0.to_string_lossy().into_owned();
    let output = bench(&["report", &path]).output().unwrap();
    assert!(output.status.success());
    let output = bench(&["report", "--check", &path]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success() && text.contains("measured: blk (1 cells)"),
        "{text}"
    );
}

#[test]
fn a_run_that_is_killed_leaves_nothing() {
    let (dir, out) = (TempDir::new(), TempDir::new());
    let mut child = small_run(&dir, &out, "600000", &[])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    wait_for("it makes a file", &|| {
        let entries = dir.entries();
        entries.iter().any(|entry| entry.join("disk.img").exists())
    });
    child.kill().unwrap();
    child.wait().unwrap();
    wait_for("the janitor clears up", &|| dir.entries().is_empty());
}

#[test]
fn a_run_that_is_stopped_keeps_what_was_measured_and_leaves_nothing_else() {
    let (dir, out) = (TempDir::new(), TempDir::new());
    let mut child = small_run(
        &dir,
        &out,
        "50",
        &["--cell=cache-randread-4k-qd32", "--rounds=1000"],
    )
    .stdout(Stdio::null())
    .stderr(Stdio::piped())
    .spawn()
    .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let measured = lines.find(|line| line.as_ref().is_ok_and(|line| line.contains("2/2000]")));
    assert!(measured.is_some(), "it never measured anything");
    let stop = Command::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status();
    assert!(stop.unwrap().success());
    let rest: Vec<String> = lines.map_while(Result::ok).collect();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{rest:?}");
    let last = rest.last().unwrap();
    assert!(last.contains("what was measured is kept"), "{rest:?}");
    let json = results(&out);
    assert_eq!(json["interrupted"], true);
    let samples = &json["scenarios"][0]["cells"][0]["series"][0]["samples"]["rate"];
    let count = samples.as_array().unwrap().len();
    assert!((2..1000).contains(&count), "{count} rounds");
    assert!(out.0.join("report.html").exists());
    assert_eq!(dir.entries(), Vec::<PathBuf>::new());
}

/// Makes every round of a result half as fast, ratios and all.
fn slowed(json: &mut serde_json::Value) {
    let series = &mut json["scenarios"][0]["cells"][0]["series"][0];
    series["role"] = "ours".into();
    for part in ["spread", "ratio"] {
        for key in ["min", "low", "median", "high", "max"] {
            let half = series[part]["rate"][key].as_f64().unwrap() / 2.0;
            series[part]["rate"][key] = half.into();
        }
    }
}

#[test]
fn a_regression_is_exit_code_1_and_no_change_is_0() {
    let (dir, before, after) = (TempDir::new(), TempDir::new(), TempDir::new());
    let output = small_run(&dir, &before, "60", &["--rounds=2"])
        .output()
        .unwrap();
    assert!(output.status.success());
    let file = before.0.join("results.json");
    let mut json = results(&before);
    json["scenarios"][0]["cells"][0]["series"][0]["role"] = "ours".into();
    fs::write(&file, json.to_string()).unwrap();
    slowed(&mut json);
    fs::write(after.0.join("results.json"), json.to_string()).unwrap();
    let compare = |one: &TempDir, other: &TempDir, more: &[&str]| {
        let paths = [&one.0, &other.0].map(|path| path.to_string_lossy().into_owned());
        let output = bench(&["compare", &paths[0], &paths[1]])
            .args(more)
            .output()
            .unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stdout).unwrap(),
        )
    };
    let (code, text) = compare(&before, &after, &[]);
    assert_eq!(code, Some(1), "{text}");
    assert!(
        text.contains("! blk cache-randread-4k-qd1 loop-pread rate") && text.contains("-50.0 %"),
        "{text}"
    );
    assert_eq!(compare(&before, &before, &[]).0, Some(0));
    assert_eq!(compare(&before, &after, &["--threshold=60"]).0, Some(0));
    let (code, text) = compare(&after, &before, &[]);
    assert!(code == Some(0) && text.contains("+ blk cache"), "{text}");
}

/// The page at the widths of a phone and of a desk: nothing sticks out. Skipped without a browser.
#[test]
fn the_page_fits_a_phone_in_a_real_browser() {
    let Some(browser) = ["chromium", "chromium-browser", "google-chrome"]
        .into_iter()
        .find(|name| {
            let version = Command::new(name)
                .arg("--version")
                .stderr(Stdio::null())
                .output();
            version.is_ok_and(|output| output.status.success())
        })
    else {
        println!("skipped: no chromium (Debian's package chromium)");
        return;
    };
    let (dir, out) = (TempDir::new(), TempDir::new());
    let output = small_run(&dir, &out, "60", &["--rounds=2"])
        .output()
        .unwrap();
    assert!(output.status.success());
    // A frame of a phone's width: the window of a headless browser is wider than that.
    let frame = r#"<!doctype html><iframe id=f src=report.html style="width:390px;height:800px"></iframe>
        <script>f.onload = () => { let d = f.contentDocument; document.title = (d.documentElement.scrollWidth
          <= d.documentElement.clientWidth ? "fits" : "sticks out") + " s" + d.querySelectorAll("svg").length; document.body.append(document.title) }</script>"#;
    fs::write(out.0.join("frame.html"), frame).unwrap();
    let profile = format!("--user-data-dir={}", out.0.join("profile").display());
    let output = Command::new(browser)
        .args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--allow-file-access-from-files",
        ])
        .args([
            &profile,
            "--timeout=30000",
            "--virtual-time-budget=20000",
            "--dump-dom",
        ])
        .arg(out.0.join("frame.html"))
        .stderr(Stdio::null())
        .output()
        .unwrap();
    let dom = String::from_utf8_lossy(&output.stdout).into_owned();
    if !dom.contains("</html>") {
        println!("skipped: {browser} shows no page here: {}", output.status);
        return;
    }
    assert!(dom.contains("fits s2"), "{dom}");
}

/// When a process began, as the janitor is told.
fn start_time(pid: u32) -> String {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let rest = stat.rsplit(')').next().unwrap();
    rest.split_whitespace().nth(19).unwrap().to_owned()
}

#[test]
fn the_janitor_ends_processes_and_puts_settings_back_last_first() {
    let dir = TempDir::new();
    let file = dir.0.join("setting");
    fs::write(&file, "changed").unwrap();
    let (folder, path) = (dir.0.join("folder"), file.display().to_string());
    fs::create_dir(&folder).unwrap();
    let mut ours = Command::new("sleep").arg("600").spawn().unwrap();
    let mut others = Command::new("sleep").arg("600").spawn().unwrap();
    let mut janitor = bench(&["janitor"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let told = format!(
        "setting {path} before\nsetting {path} between\nprocess {} {}\nprocess {} 1\ndirectory {}\ndirectory {}/gone\nnonsense\n",
        ours.id(),
        start_time(ours.id()),
        // Its number is somebody else's by now.
        others.id(),
        folder.display(),
        folder.display(),
    );
    let sent = janitor.stdin.take().unwrap().write_all(told.as_bytes());
    // It waits until a process is gone, and a child of ours is when we have waited for it.
    let status = ours.wait().unwrap();
    let output = janitor.wait_with_output().unwrap();
    let survivor = others.try_wait().unwrap();
    others.kill().unwrap();
    others.wait().unwrap();
    sent.unwrap();
    assert_eq!(status.signal(), Some(9));
    assert!(survivor.is_none(), "{survivor:?}");
    assert_eq!(fs::read_to_string(&file).unwrap(), "before");
    assert!(!folder.exists());
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(
        text.contains("cannot clear up nonsense: unknown kind"),
        "{text}"
    );
    assert_eq!(text.lines().count(), 2, "{text}");
}
