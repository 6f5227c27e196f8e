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
