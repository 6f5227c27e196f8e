//! fio's io_uring engine, as a check on our own loop for the limit.
#![forbid(unsafe_code)]

use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::super::setup::Setup;
use super::backing::Disk;
use super::subject::Subject;
use super::target::{Direction, Load};
use crate::scenario::Sample;
use crate::sys;

/// One run of the same pattern.
pub fn run(setup: &Setup, load: &Load, disk: &Disk, subject: &Subject) -> Result<Sample> {
    let program = subject.program.as_ref().context("no fio")?;
    let mut command = Command::new(program);
    command
        .args(arguments(setup, load, disk))
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .stdout(Stdio::piped());
    // Both cores, as a client and its daemon have together: the kernel's workers get one of them.
    sys::tie_child(&mut command, &[setup.client_cpu, setup.daemon_cpu]);
    let output = command.output().context("cannot start fio")?;
    if !output.status.success() {
        bail!("fio ended with {}", output.status);
    }
    // Warnings may stand before the JSON.
    let text = String::from_utf8_lossy(&output.stdout);
    let json = &text[text.find('{').context("fio printed no JSON")?..];
    let json: Value = serde_json::from_str(json).context("fio's JSON")?;
    parse(&json, load.direction).context("fio's JSON lacks what we look for")
}

fn arguments(setup: &Setup, load: &Load, disk: &Disk) -> Vec<String> {
    let millis = |time: Duration| format!("{}ms", time.as_millis());
    let rw = match (load.random, load.direction) {
        (true, Direction::Read) => "randread",
        (true, Direction::Write) => "randwrite",
        (false, Direction::Read) => "read",
        (false, Direction::Write) => "write",
    };
    let direct = u8::from(disk.backing.direct());
    vec![
        "--name=limit".to_owned(),
        "--output-format=json".to_owned(),
        "--ioengine=io_uring".to_owned(),
        "--time_based".to_owned(),
        "--norandommap".to_owned(),
        "--allow_file_create=0".to_owned(),
        // By default fio throws the file out of the page cache first.
        "--invalidate=0".to_owned(),
        format!("--filename={}", disk.path.display()),
        format!("--size={}", disk.size),
        format!("--direct={direct}"),
        format!("--rw={rw}"),
        format!("--bs={}", load.block),
        format!("--iodepth={}", load.depth),
        format!("--ramp_time={}", millis(setup.window.warmup)),
        format!("--runtime={}", millis(setup.window.measured)),
    ]
}

fn parse(json: &Value, direction: Direction) -> Option<Sample> {
    let side = match direction {
        Direction::Read => "read",
        Direction::Write => "write",
    };
    let side = &json["jobs"][0][side];
    let latency = |percentile: &str| {
        let ns = side["clat_ns"]["percentile"][percentile].as_f64()?;
        Some(ns / 1000.0)
    };
    let rate = side["iops"].as_f64().filter(|&iops| iops > 0.0)?;
    let sample = Sample::new()
        .figure("rate", rate)
        .figure("p50", latency("50.000000")?)
        .figure("p99", latency("99.000000")?)
        .figure("p999", latency("99.900000")?);
    Some(sample)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn fios_json_is_read_from_the_side_that_ran() {
        let percentile = json!({"50.000000": 1500, "99.000000": 2500, "99.900000": 9000});
        let write = json!({"iops": 1000.5, "clat_ns": {"percentile": percentile}});
        let json = json!({"jobs": [{"read": {"iops": 0.0}, "write": write}]});
        let run = parse(&json, Direction::Write).unwrap();
        let figures = ["rate", "p50", "p999"].map(|metric| run.figures[metric]);
        assert_eq!(figures, [1000.5, 1.5, 9.0]);
        assert!(parse(&json, Direction::Read).is_none());
    }
}
