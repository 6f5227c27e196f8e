//! Which of our crates may depend on which: the arrows of ARCHITECTURE.md, over `cargo metadata`.
//! Build and test dependencies count too.

use std::collections::BTreeMap;
use std::process::Command;

use serde_json::Value;

/// Every crate of the workspace with all of our crates that it may depend on.
const ARROWS: [(&str, &[&str]); 10] = [
    ("berth-blk", &["berth-queue-worker"]),
    ("berth-irqchip", &[]),
    ("berth-net", &["berth-queue-worker"]),
    (
        "berth-perf",
        &["berth-tests-framework", "berth-vmm-api-types"],
    ),
    ("berth-queue-worker", &[]),
    (
        "berth-tests-cases",
        &["berth-tests-framework", "berth-vmm-api-types"],
    ),
    ("berth-tests-framework", &["berth-vmm-api-types"]),
    ("berth-tuner", &["berth-vmm-api-types"]),
    ("berth-vmm", &["berth-irqchip", "berth-vmm-api-types"]),
    ("berth-vmm-api-types", &[]),
];

#[test]
fn crates_depend_on_each_other_only_along_the_arrows() {
    let allowed = BTreeMap::from(ARROWS);
    for (name, dependencies) in workspace() {
        let Some(allowed) = allowed.get(name.as_str()) else {
            panic!("{name} is new: say in ARROWS what it may depend on");
        };
        for dependency in dependencies {
            assert!(
                allowed.contains(&dependency.as_str()),
                "{name} must not depend on {dependency}"
            );
        }
    }
}

/// Name and in-workspace dependencies of every member.
fn workspace() -> Vec<(String, Vec<String>)> {
    let output = Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--no-deps",
            "--format-version=1",
            "--locked",
            "--offline",
        ])
        .output()
        .expect("cargo runs");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo writes JSON");
    let packages = metadata["packages"].as_array().expect("a list of packages");
    packages
        .iter()
        .map(|package| {
            let own = package["dependencies"]
                .as_array()
                .into_iter()
                .flatten()
                // A dependency by path is one of ours.
                .filter(|dependency| dependency["path"].is_string())
                .map(|dependency| text(&dependency["name"]))
                .collect();
            (text(&package["name"]), own)
        })
        .collect()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}
