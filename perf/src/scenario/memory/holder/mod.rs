//! A process that holds the memory of a guest: the hidden subcommand `memory-holder`.
//!
//! ```text
//!   berth-perf ── stdin: a command a line ──▶ main: writes a dump's pages into the memory, little by little
//!              ◀─ stdout: an answer a line ─┤
//!   berth-tuner ── API socket ─────────────▶ api: what the VMM answers a tuner (`api.rs`)
//!                                            vcpu0: the guest's work on its memory (`vcpu.rs`)
//! ```
//!
//! | command | answer |
//! |---|---|
//! | `load STATE MS` | `loaded PAGES`: the pages in which STATE differs were written, spread over MS milliseconds |
//! | `offer` | `offered`: all memory is advised mergeable |
//! | `figures` | JSON of [`Figures`] since the last time |
//!
//! It ends with its standard input.

mod api;
mod hashes;
mod region;
mod vcpu;

use std::fs;
use std::io::{BufRead, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use serde::{Deserialize, Serialize};

pub(crate) use api::DOMAIN;
pub(crate) use vcpu::Work;

use self::api::Api;
use self::region::{Advice, Region};
use self::vcpu::{Contents, Vcpu};
use super::dumps::store::{ABSENT, PAGE, Reader, ZERO};

/// The hidden subcommand.
pub const SUBCOMMAND: &str = "memory-holder";
/// Pages that are written between two looks at the time.
const CHUNK: usize = 64;

/// Of the subcommand.
#[derive(Debug, Clone, Args)]
pub struct HolderArgs {
    /// Socket of its API
    #[arg(long)]
    socket: PathBuf,
    /// The set of dumps
    #[arg(long)]
    dumps: PathBuf,
    /// Whose memory
    #[arg(long)]
    guest: String,
    /// A byte for each number of a page: 1, no other guest has it
    #[arg(long)]
    own: PathBuf,
}

/// What a holder says of itself.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Figures {
    /// The guest's work.
    pub(crate) work: Work,
    /// For each huge page whether it is one; empty where the kernel does not say.
    pub(crate) huge: Vec<bool>,
}

/// The subcommand.
pub fn run(args: &HolderArgs) -> Result<()> {
    let holder = Holder::new(args)?;
    let mut out = std::io::stdout().lock();
    for line in std::io::stdin().lock().lines() {
        let answer = holder.obey(&line?)?;
        writeln!(out, "{answer}")?;
        out.flush()?;
    }
    Ok(())
}

struct Holder {
    guest: String,
    reader: Reader,
    region: Arc<Region>,
    contents: Arc<Contents>,
    api: Arc<Api>,
    vcpu: Arc<Vcpu>,
}

impl Holder {
    fn new(args: &HolderArgs) -> Result<Self> {
        let reader = Reader::open(&args.dumps)?;
        let region = Arc::new(Region::new(reader.set.bytes)?);
        region.advise(0, region.bytes(), Advice::Thp)?;
        let pages = usize::try_from(region.bytes())? / PAGE;
        let own = own(&args.own)?;
        let holder = Self {
            guest: args.guest.clone(),
            reader,
            contents: Arc::new(Contents::new(pages, own)),
            api: Arc::new(Api {
                region: Arc::clone(&region),
                offered: Mutex::new(vec![false; pages]),
            }),
            vcpu: Arc::default(),
            region,
        };
        let listener =
            UnixListener::bind(&args.socket).with_context(|| args.socket.display().to_string())?;
        let api = Arc::clone(&holder.api);
        thread("api", move || api.serve(&listener))?;
        let vcpu = Arc::clone(&holder.vcpu);
        let (region, contents) = (Arc::clone(&holder.region), Arc::clone(&holder.contents));
        thread("vcpu0", move || vcpu.run(&region, &contents))?;
        Ok(holder)
    }

    fn obey(&self, line: &str) -> Result<String> {
        let words: Vec<&str> = line.split_whitespace().collect();
        Ok(match words[..] {
            ["load", state, ms] => {
                let pages = self.load(state, Duration::from_millis(ms.parse()?))?;
                format!("loaded {pages}")
            }
            ["offer"] => {
                self.api.offer_all()?;
                "offered".to_owned()
            }
            ["figures"] => serde_json::to_string(&Figures {
                work: self.vcpu.take(),
                huge: self.region.huge().unwrap_or_default(),
            })?,
            _ => bail!("not a command: {line:?}"),
        })
    }

    /// Makes the memory that of a state. Pages that the dump does not have stay as they are.
    fn load(&self, state: &str, over: Duration) -> Result<usize> {
        let map = self.reader.map(&self.guest, state)?;
        let is_new = |(page, number): &(usize, &u32)| {
            **number != ABSENT && **number != self.contents.get(*page)
        };
        let new: Vec<(usize, u32)> = map
            .iter()
            .enumerate()
            .filter(is_new)
            .map(|(page, number)| (page, *number))
            .collect();
        let began = Instant::now();
        let mut contents = [0; PAGE];
        for (at, chunk) in new.chunks(CHUNK).enumerate() {
            for (page, number) in chunk {
                self.reader.page(*number, &mut contents)?;
                match *number {
                    // It may be there as part of a huge page, as zeros.
                    ZERO if self.contents.get(*page) == ABSENT => {
                        self.region.write(page * (PAGE / 8), 0);
                    }
                    _ => self.region.write_page(*page, &contents),
                }
                self.contents.set(*page, *number);
            }
            let due = over.mul_f64(((at + 1) * CHUNK) as f64 / new.len().max(1) as f64);
            std::thread::sleep(due.min(over).saturating_sub(began.elapsed()));
        }
        Ok(new.len())
    }
}

fn own(path: &Path) -> Result<Vec<bool>> {
    let bytes = fs::read(path).with_context(|| path.display().to_string())?;
    Ok(bytes.iter().map(|byte| *byte == 1).collect())
}

fn thread(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(work)
        .map(drop)
        .with_context(|| format!("cannot start {name}"))
}
