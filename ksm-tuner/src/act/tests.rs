//! Changes are made in order and put back, also those of a tuner that was killed.

use super::*;
use std::fs;

use crate::testing::Folder;

const FILES: [(&str, &str); 7] = [
    ("run", "0"),
    ("advisor_mode", "scan-time"),
    ("pages_to_scan", "100"),
    ("sleep_millisecs", "20"),
    ("smart_scan", "1"),
    ("use_zero_pages", "0"),
    ("max_page_sharing", "256"),
];

fn host() -> (Folder, Kernel, Settings) {
    let folder = Folder::new();
    let ksm = folder.path().join("ksm");
    fs::create_dir_all(&ksm).unwrap();
    for (name, value) in FILES {
        fs::write(ksm.join(name), value).unwrap();
    }
    let settings = Settings {
        run: 0,
        pages_to_scan: 100,
        sleep_millisecs: 20,
        smart_scan: Some(1),
        use_zero_pages: Some(0),
        max_page_sharing: Some(256),
        advisor_mode: Some("scan-time".to_owned()),
    };
    (folder, Kernel { ksm }, settings)
}

fn is(kernel: &Kernel, name: &str) -> String {
    fs::read_to_string(kernel.ksm.join(name)).unwrap()
}

fn burst(now: &Settings) -> Settings {
    Settings {
        run: 1,
        pages_to_scan: 1800,
        sleep_millisecs: 10,
        use_zero_pages: Some(1),
        advisor_mode: Some("none".to_owned()),
        ..now.clone()
    }
}

#[test]
fn what_a_killed_tuner_changed_is_put_back_by_the_next() {
    let (folder, kernel, now) = host();
    let run = folder.path().join("run");
    let mut saved = Saved::open(&run).unwrap();
    let wanted = burst(&now);
    kernel.set(&mut saved, &now, &wanted).unwrap();
    assert_eq!(is(&kernel, "pages_to_scan"), "1800");
    // A second change does not become the original.
    let faster = Settings {
        pages_to_scan: 3000,
        ..wanted.clone()
    };
    kernel.set(&mut saved, &wanted, &faster).unwrap();
    // Killed: the lock goes with the process, the file stays.
    drop(saved);
    let mut saved = Saved::open(&run).unwrap();
    assert_eq!(kernel.restore(&mut saved).unwrap(), 5);
    for (name, value) in FILES {
        assert_eq!(is(&kernel, name), value, "{name}");
    }
    assert_eq!(kernel.restore(&mut saved).unwrap(), 0);
    assert!(!run.join("state.json").exists());
}

#[test]
fn what_was_not_changed_is_not_touched() {
    let (folder, kernel, now) = host();
    let mut saved = Saved::open(&folder.path().join("run")).unwrap();
    let wanted = Settings {
        run: 1,
        ..now.clone()
    };
    kernel.set(&mut saved, &now, &wanted).unwrap();
    fs::write(kernel.ksm.join("pages_to_scan"), "77").unwrap();
    kernel.restore(&mut saved).unwrap();
    assert_eq!(is(&kernel, "pages_to_scan"), "77");
    assert_eq!(is(&kernel, "run"), "0");
}

#[test]
fn where_nothing_can_be_noted_nothing_is_changed() {
    let (folder, kernel, now) = host();
    let run = folder.path().join("run");
    let mut saved = Saved::open(&run).unwrap();
    fs::remove_dir_all(&run).unwrap();
    let error = kernel.set(&mut saved, &now, &burst(&now)).unwrap_err();
    assert!(matches!(error, Error::Saved(_)), "{error}");
    assert_eq!(is(&kernel, "run"), "0");
}

#[test]
fn a_file_that_the_kernel_does_not_have_is_named_and_not_made() {
    let (folder, kernel, now) = host();
    let mut saved = Saved::open(&folder.path().join("run")).unwrap();
    fs::remove_file(kernel.ksm.join("sleep_millisecs")).unwrap();
    let error = kernel.set(&mut saved, &now, &burst(&now)).unwrap_err();
    assert!(
        error.to_string().starts_with("cannot write 10 to "),
        "{error}"
    );
    assert!(!kernel.ksm.join("sleep_millisecs").exists());
    assert_eq!(is(&kernel, "run"), "0", "it is started last");
    // The rest is put back all the same.
    assert!(kernel.restore(&mut saved).is_err());
    assert_eq!(is(&kernel, "pages_to_scan"), "100");
}

#[test]
fn there_is_one_tuner_to_a_folder() {
    let (folder, ..) = host();
    let run = folder.path().join("run");
    let first = Saved::open(&run).unwrap();
    let error = Saved::open(&run).unwrap_err().to_string();
    assert!(
        error.starts_with("another berth-tuner runs with "),
        "{error}"
    );
    drop(first);
    let mut saved = Saved::open(&run).unwrap();
    saved.note_balloon(Path::new("/a"), 5).unwrap();
    saved.note_balloon(Path::new("/a"), 9).unwrap();
    drop(saved);
    let mut saved = Saved::open(&run).unwrap();
    assert_eq!(saved.balloons()[Path::new("/a")], 5);
    saved.forget_balloon(Path::new("/a")).unwrap();
    drop(saved);
    fs::write(run.join("state.json"), "{").unwrap();
    assert!(matches!(Saved::open(&run), Err(SavedError::Damaged { .. })));
}
