//! The vhost-user daemons, ours and QEMU's, and where their sockets are.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::http;
use crate::process::{Process, Signal};
use crate::story::Context;
use crate::wait::seconds;

/// A daemon that can be started again on the same socket.
#[derive(Debug)]
pub struct Daemon {
    name: String,
    program: PathBuf,
    args: Vec<String>,
    socket: PathBuf,
    metrics: Option<PathBuf>,
    log: PathBuf,
    process: Process,
}

/// Settings of a [`Daemon::blk`].
#[derive(Debug, Clone, Copy, Default)]
pub struct BlkSettings<'a> {
    /// Whether writes are refused.
    pub read_only: bool,
    /// Virtqueues, one if 0.
    pub queues: u16,
    /// What GET_ID says, if anything.
    pub serial_id: Option<&'a str>,
    /// Further flags.
    pub more: &'a [&'a str],
}

impl Daemon {
    /// Starts berth-blk on an image; its socket and log are named `name`.
    ///
    /// # Errors
    /// It does not come up.
    pub fn blk(context: &Context, name: &str, image: &Path, set: BlkSettings<'_>) -> Result<Self> {
        let mut args = vec![format!("--blk-file={}", image.display())];
        if set.read_only {
            args.push("--read-only".to_owned());
        }
        args.push(format!("--num-queues={}", set.queues.max(1)));
        args.extend(set.serial_id.map(|id| format!("--serial-id={id}")));
        let control = context.scratch(&format!("{name}.ctl"));
        args.push(format!("--control-socket={}", control.display()));
        args.extend(set.more.iter().map(|&flag| flag.to_owned()));
        Self::ours(context, "berth-blk", name, args)
    }

    /// Starts berth-net on a tap; `create` lets the daemon make it.
    ///
    /// # Errors
    /// It does not come up.
    pub fn net(context: &Context, name: &str, tap: &str, more: &[String]) -> Result<Self> {
        let mut args = vec![format!("--tap={tap}")];
        args.extend_from_slice(more);
        Self::ours(context, "berth-net", name, args)
    }

    /// A program of ours with `--socket-path` and `--metrics-socket`.
    fn ours(context: &Context, program: &str, name: &str, args: Vec<String>) -> Result<Self> {
        let socket = context.scratch(&format!("{name}.sock"));
        let metrics = context.scratch(&format!("{name}.metrics"));
        let mut all = vec![
            format!("--socket-path={}", socket.display()),
            format!("--metrics-socket={}", metrics.display()),
        ];
        all.extend(args);
        Self::start(
            context,
            name,
            context.bin(program),
            all,
            socket,
            Some(metrics),
        )
    }

    /// Starts qemu-storage-daemon with a raw image exported as vhost-user-blk.
    ///
    /// # Errors
    /// It is not installed or does not come up.
    pub fn qemu_storage(context: &Context, name: &str, image: &Path) -> Result<Self> {
        let socket = context.scratch(&format!("{name}.sock"));
        let args = vec![
            "--blockdev".to_owned(),
            format!(
                "driver=file,node-name=file,discard=unmap,filename={}",
                image.display()
            ),
            "--blockdev".to_owned(),
            "driver=raw,node-name=disk,discard=unmap,file=file".to_owned(),
            "--export".to_owned(),
            format!(
                "type=vhost-user-blk,id=export,node-name=disk,writable=on,\
                 addr.type=unix,addr.path={}",
                socket.display()
            ),
        ];
        Self::start(
            context,
            name,
            "qemu-storage-daemon".into(),
            args,
            socket,
            None,
        )
    }

    fn start(
        context: &Context,
        name: &str,
        program: PathBuf,
        args: Vec<String>,
        socket: PathBuf,
        metrics: Option<PathBuf>,
    ) -> Result<Self> {
        let log = context.log(name);
        let process = spawn(name, &program, &args, &log)?;
        process.wait_path(&socket, seconds(30))?;
        Ok(Self {
            name: name.to_owned(),
            program,
            args,
            socket,
            metrics,
            log,
            process,
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its process.
    #[must_use]
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Its process, to wait for its end.
    pub fn process_mut(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Kills it as `kill -9` does; its socket stays behind.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Starts it again after its end, with the arguments that it had.
    ///
    /// # Errors
    /// It does not come up.
    pub fn start_again(&mut self) -> Result<()> {
        self.process = spawn(&self.name, &self.program, &self.args, &self.log)?;
        // The old socket file may still be there: a connection shows the new listener.
        crate::wait::until(
            &format!("{} to listen again", self.name),
            seconds(30),
            || {
                anyhow::ensure!(
                    self.process.is_running(),
                    "{} ended at its start",
                    self.name
                );
                let Some(metrics) = &self.metrics else {
                    return Ok(Some(()));
                };
                Ok(UnixStream::connect(metrics).ok().map(drop))
            },
        )
    }

    /// Stops or continues it by signal.
    ///
    /// # Errors
    /// It has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.process.signal(signal)
    }

    /// Its answer to a command on its control socket, without `ok`.
    ///
    /// # Errors
    /// It has none, does not answer, or answers with an error.
    pub fn command(&self, command: &str) -> Result<String> {
        let stream = UnixStream::connect(self.socket.with_extension("ctl"))?;
        stream.set_read_timeout(Some(seconds(10)))?;
        (&stream).write_all(format!("{command}\n").as_bytes())?;
        let mut answer = String::new();
        BufReader::new(&stream).read_line(&mut answer)?;
        let text = answer.trim_end().strip_prefix("ok ");
        let text = text.with_context(|| format!("{} to {command:?}: {answer:?}", self.name))?;
        Ok(text.to_owned())
    }

    /// Its counters.
    ///
    /// # Errors
    /// It has none or does not answer.
    pub fn metrics(&self) -> Result<BTreeMap<String, f64>> {
        let socket = self.metrics.as_ref().context("a daemon without metrics")?;
        http::metrics(socket, seconds(10))
    }

    /// Sum of one of its counters over all queues.
    ///
    /// # Errors
    /// There is no such counter.
    pub fn total(&self, name: &str) -> Result<u64> {
        let metrics = self.metrics()?;
        http::total(&metrics, name)
            .with_context(|| format!("{} has no {name}: {:?}", self.name, metrics.keys()))
    }
}

fn spawn(name: &str, program: &Path, args: &[String], log: &Path) -> Result<Process> {
    let mut command = Command::new(program);
    command.args(args);
    Process::spawn(name, command, log)
}
