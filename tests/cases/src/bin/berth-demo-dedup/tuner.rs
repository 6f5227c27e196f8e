//! berth-tuner over the guests of a round.

use std::io::{BufRead as _, BufReader, Lines};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use anyhow::{Context as _, Result};
use berth_tests_framework::process::{self, Process, Signal};
use berth_tests_framework::story::Context;
use berth_tests_framework::wait::{seconds, until};
use serde_json::Value;

use crate::farm::DOMAIN;

/// A running tuner.
pub(crate) struct Tuner {
    process: Process,
    program: PathBuf,
    run_dir: PathBuf,
}

impl Tuner {
    /// Starts one for the VMs whose API sockets are in `sockets`, and waits until it answers.
    pub(crate) fn start(context: &Context, sockets: &Path) -> Result<Self> {
        let run_dir = context.scratch("tuner");
        let config = context.scratch("tuner.toml");
        let text = format!(
            "[general]\nvms = {:?}\nrun_dir = {:?}\n[merge]\ndomain = {DOMAIN:?}\n",
            sockets.display().to_string(),
            run_dir.display().to_string()
        );
        std::fs::write(&config, text)?;
        let program = context.bin("berth-tuner");
        let mut command = Command::new(&program);
        command.arg("run").arg("--config").arg(config);
        let process = Process::spawn("berth-tuner", command, &context.log("berth-tuner"))?;
        let tuner = Self {
            process,
            program,
            run_dir,
        };
        until("berth-tuner to answer", seconds(60), || {
            tuner.check_runs()?;
            Ok(tuner.status().ok().map(drop))
        })?;
        Ok(tuner)
    }

    /// What it says of itself.
    pub(crate) fn status(&self) -> Result<Value> {
        let run_dir = self.run_dir.display().to_string();
        let args = ["status", "--json", "--run-dir", &run_dir];
        let text = process::run(&self.program.display().to_string(), &args)?;
        Ok(serde_json::from_str(&text)?)
    }

    /// What it says of itself, again and again: until it ends, or whoever looks has seen enough.
    pub(crate) fn watch(&self) -> Result<Watch> {
        let mut command = Command::new(&self.program);
        command
            .args(["watch", "--json", "--run-dir"])
            .arg(&self.run_dir);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("berth-tuner watch")?;
        let stdout = child
            .stdout
            .take()
            .context("no output of berth-tuner watch")?;
        Ok(Watch {
            child,
            lines: BufReader::new(stdout).lines(),
        })
    }

    fn check_runs(&self) -> Result<()> {
        match self.process.is_running() {
            true => Ok(()),
            false => anyhow::bail!("berth-tuner ended: {}", self.process.output()?),
        }
    }

    /// Told to end.
    pub(crate) fn end(&mut self) -> Result<()> {
        self.process.signal(Signal::Term)?;
        self.process.wait_success(seconds(60))
    }
}

/// A running `berth-tuner watch`.
pub(crate) struct Watch {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Watch {
    /// The next status.
    pub(crate) fn next(&mut self) -> Result<Value> {
        let line = self.lines.next().context("berth-tuner watch has ended")??;
        Ok(serde_json::from_str(&line)?)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
