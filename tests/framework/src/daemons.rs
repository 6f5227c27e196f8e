//! The vhost-user daemons, ours and QEMU's, and where their sockets are.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

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
    /// The socket that it inherits as descriptor 3; none where it makes its own.
    inherits: Option<UnixListener>,
    process: Process,
}

/// Where a daemon listens.
#[derive(Debug)]
enum Listens {
    /// On a socket that it makes there.
    Itself(PathBuf),
    /// On this one, which is there already.
    Inherits(PathBuf, UnixListener),
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
        let socket = context.scratch(&format!("{name}.sock"));
        let args = blk_args(context, name, image, set);
        Self::ours(context, "berth-blk", name, args, Listens::Itself(socket))
    }

    /// The same on a listening socket that outlives the process: whoever is started after it serves there too.
    ///
    /// # Errors
    /// The socket cannot be made, or the daemon does not come up.
    pub fn blk_on_inherited(
        context: &Context,
        name: &str,
        image: &Path,
        set: BlkSettings<'_>,
    ) -> Result<Self> {
        let socket = context.scratch(&format!("{name}.sock"));
        let listener = UnixListener::bind(&socket).with_context(|| socket.display().to_string())?;
        let args = blk_args(context, name, image, set);
        let listens = Listens::Inherits(socket, listener);
        Self::ours(context, "berth-blk", name, args, listens)
    }

    /// Starts berth-net on a tap; `create` lets the daemon make it.
    ///
    /// # Errors
    /// It does not come up.
    pub fn net(context: &Context, name: &str, tap: &str, more: &[String]) -> Result<Self> {
        let mut args = vec![format!("--tap={tap}")];
        args.extend_from_slice(more);
        let socket = context.scratch(&format!("{name}.sock"));
        Self::ours(context, "berth-net", name, args, Listens::Itself(socket))
    }

    /// A program of ours with `--metrics-socket`.
    fn ours(
        context: &Context,
        program: &str,
        name: &str,
        args: Vec<String>,
        listens: Listens,
    ) -> Result<Self> {
        let metrics = context.scratch(&format!("{name}.metrics"));
        let mut all = vec![format!("--metrics-socket={}", metrics.display())];
        all.push(match &listens {
            Listens::Itself(socket) => format!("--socket-path={}", socket.display()),
            Listens::Inherits(..) => "--fd=3".to_owned(),
        });
        all.extend(args);
        let program = context.bin(program);
        Self::start(context, name, program, all, listens, Some(metrics))
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
            Listens::Itself(socket),
            None,
        )
    }

    /// Starts a daemon of somebody else's, which listens on a socket of its name in the scratch folder;
    /// `args` are made from that socket's path.
    ///
    /// # Errors
    /// It does not come up.
    pub fn other(
        context: &Context,
        name: &str,
        program: PathBuf,
        args: impl FnOnce(&Path) -> Vec<String>,
    ) -> Result<Self> {
        let socket = context.scratch(&format!("{name}.sock"));
        let args = args(&socket);
        Self::start(context, name, program, args, Listens::Itself(socket), None)
    }

    fn start(
        context: &Context,
        name: &str,
        program: PathBuf,
        args: Vec<String>,
        listens: Listens,
        metrics: Option<PathBuf>,
    ) -> Result<Self> {
        let log = context.log(name);
        let (socket, inherits) = match listens {
            Listens::Itself(socket) => (socket, None),
            Listens::Inherits(socket, listener) => (socket, Some(listener)),
        };
        let process = spawn(name, &program, &args, inherits.as_ref(), &log)?;
        process.wait_path(&socket, seconds(30))?;
        Ok(Self {
            name: name.to_owned(),
            program,
            args,
            socket,
            metrics,
            log,
            inherits,
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
        let inherits = self.inherits.as_ref();
        self.process = spawn(&self.name, &self.program, &self.args, inherits, &self.log)?;
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

fn blk_args(context: &Context, name: &str, image: &Path, set: BlkSettings<'_>) -> Vec<String> {
    let mut args = vec![format!("--blk-file={}", image.display())];
    if set.read_only {
        args.push("--read-only".to_owned());
    }
    args.push(format!("--num-queues={}", set.queues.max(1)));
    args.extend(set.serial_id.map(|id| format!("--serial-id={id}")));
    let control = context.scratch(&format!("{name}.ctl"));
    args.push(format!("--control-socket={}", control.display()));
    args.extend(set.more.iter().map(|&flag| flag.to_owned()));
    args
}

fn spawn(
    name: &str,
    program: &Path,
    args: &[String],
    inherits: Option<&UnixListener>,
    log: &Path,
) -> Result<Process> {
    let Some(listener) = inherits else {
        let mut command = Command::new(program);
        command.args(args);
        return Process::spawn(name, command, log);
    };
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$0\" \"$@\" 3<&0 </dev/null"]);
    command.arg(program).args(args);
    let stdin = Stdio::from(OwnedFd::from(listener.try_clone()?));
    Process::spawn_with_stdin(name, command, stdin, log)
}
