//! QEMU's control socket: one JSON object a line each way, and events in between, which are skipped.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::wait::{self, Broken, patient, seconds};

/// A connection that has been negotiated.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
}

impl Qmp {
    /// Greets QEMU on a connected socket.
    ///
    /// # Errors
    /// It does not answer as QEMU does.
    pub fn new(stream: UnixStream) -> Result<Self> {
        stream.set_read_timeout(Some(patient(seconds(60))))?;
        let mut qmp = Self {
            reader: BufReader::new(stream),
        };
        let greeting = qmp.line()?;
        anyhow::ensure!(!greeting["QMP"].is_null(), "greeting: {greeting}");
        qmp.run("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        let count = self.reader.read_line(&mut line).context("QMP")?;
        if count == 0 {
            return Err(Broken::Gone("QEMU closed its control socket".to_owned()).into());
        }
        serde_json::from_str(&line).with_context(|| format!("QMP line {line:?}"))
    }

    /// Runs a command; what it returned.
    ///
    /// # Errors
    /// QEMU refuses, or is gone.
    pub fn run(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let request = json!({"execute": command, "arguments": arguments});
        writeln!(self.reader.get_mut(), "{request}")?;
        loop {
            let mut answer = self.line()?;
            if let Some(error) = answer.get("error") {
                bail!("QEMU refuses {request}: {error}");
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    /// Asks about the outgoing migration until `enough` says so; fails when the migration did.
    ///
    /// # Errors
    /// It failed, was cancelled, or took longer than `limit`.
    pub fn wait_migration(
        &mut self,
        what: &str,
        limit: std::time::Duration,
        mut enough: impl FnMut(&Value) -> Result<bool>,
    ) -> Result<Value> {
        wait::until(what, limit, || {
            let state = self.run("query-migrate", json!({}))?;
            let status = state["status"].as_str().unwrap_or_default();
            if ["failed", "cancelled"].contains(&status) {
                bail!("migration: {state}");
            }
            Ok(enough(&state)?.then_some(state))
        })
    }
}
