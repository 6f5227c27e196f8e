//! What the modes of guest memory cost a guest's disk and network card, side by side in one host.
//!
//! ```text
//!   round ─▶ cell (disk: 4, 64, 256 KiB, read and written; card: each way) ─▶ shared, window, shadow     a share: shared's time / the mode's
//! ```
//!
//! Guests of one kernel, one vCPU and one size stay up; one at a time has a cell to do, the next in turn does the
//! same at once. Nothing of it fails a check but that it cannot be measured: figures go to `modes.figures.json`, and are
//! to be read as shares, as in the lab time is emulated.

use std::fs;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use berth_tests_framework::daemons::{BlkSettings, Daemon};
use berth_tests_framework::story::{Context, Story, Tier};
use berth_tests_framework::vmm::{self, Vm, VmBuilder};
use berth_tests_framework::wait::seconds;
use berth_tests_framework::{image, net};
use serde_json::{Value, json};

use crate::balloon::note;

/// Stories of this file.
pub const STORIES: &[Story] = &[Story {
    name: "modes",
    tier: Tier::Guest,
    long: true,
    checks: &["modes.disk", "modes.net"],
    run: side_by_side,
}];

const ROUNDS: usize = 5;
const DISK: u64 = 64 << 20;
const PAGE: u64 = 16 << 20;
/// How long a cell may take.
const LIMIT: Duration = seconds(120);

/// A mode by its name, what `--memory` says, and what each device says.
struct Mode {
    name: &'static str,
    memory: &'static str,
    device: &'static str,
}

const MODES: [Mode; 3] = [
    Mode {
        name: "shared",
        memory: "1G,shared=on",
        device: "",
    },
    Mode {
        name: "window",
        memory: "1G,mergeable=on",
        device: ",dma=window",
    },
    Mode {
        name: "shadow",
        memory: "1G,mergeable=on",
        device: ",dma=shadow",
    },
];

/// Requests of so many KiB, one after the other, past the guest's page cache.
const BLOCKS: [(u64, u64); 3] = [(4, 1500), (64, 600), (256, 256)];

struct Guest {
    mode: &'static Mode,
    host: Ipv4Addr,
    address: Ipv4Addr,
    vm: Vm,
    vcpu: i32,
    _daemons: [Daemon; 2],
}

/// What a cell took: time, and of it what the vCPU's thread ran.
#[derive(Clone, Copy)]
struct Took {
    all: Duration,
    vcpu: Duration,
}

impl Guest {
    fn boot(context: &Context, mode: &'static Mode, number: u8) -> Result<Self> {
        let disk = context.scratch(&format!("{}.img", mode.name));
        image::random(&disk, DISK, 7)?;
        let blk = format!("blk-{}", mode.name);
        let blk = Daemon::blk(context, &blk, &disk, BlkSettings::default())?;
        let tap = format!("tap{number}");
        net::make_tap(&tap)?;
        let card = Daemon::net(context, &format!("net-{}", mode.name), &tap, &[])?;
        let [host, address] = [1, 2].map(|end| Ipv4Addr::new(10, 63, number, end));
        net::bring_up(&tap, host)?;
        // A vCPU's thread that polls for an event runs, and does nothing for its guest.
        let mut vm = VmBuilder::new(context, mode.name)
            .append("mitigations=off")
            .memory(mode.memory)
            .platform("halt_poll_ns=0")
            .disk(blk.socket(), mode.device)
            .net(card.socket(), mode.device)
            .boot(context)?;
        vmm::bring_up(&mut vm.console, "eth0", address)?;
        let page = format!("dd if=/dev/vda of=/tmp/page bs=1M count={}", PAGE >> 20);
        vm.sh(&format!("{page} 2>/dev/null; httpd -p 80 -h /tmp"))?;
        let threads = vm.process.threads()?;
        let vcpu = threads.iter().find(|(_, name)| name == "vcpu0");
        Ok(Self {
            mode,
            host,
            address,
            vcpu: vcpu.context("no thread vcpu0")?.0,
            vm,
            _daemons: [blk, card],
        })
    }

    /// What the vCPU's thread has run until now.
    fn ran(&self) -> Result<Duration> {
        let path = format!(
            "/proc/{}/task/{}/schedstat",
            self.vm.process.pid(),
            self.vcpu
        );
        let stat = fs::read_to_string(&path).context(path)?;
        let ran = stat.split_whitespace().next().unwrap_or_default();
        Ok(Duration::from_nanos(ran.parse()?))
    }

    fn time(&mut self, cell: impl FnOnce(&mut Self) -> Result<()>) -> Result<Took> {
        let (begin, ran) = (Instant::now(), self.ran()?);
        cell(self)?;
        Ok(Took {
            all: begin.elapsed(),
            vcpu: self.ran()?.saturating_sub(ran),
        })
    }
}

/// One cell: what every mode took, in each round.
struct Cell {
    name: String,
    /// Requests or bytes of one time.
    count: u64,
    took: Vec<Vec<Took>>,
}

impl Cell {
    /// Has all guests do it in turn, once for nothing.
    fn measure(
        name: String,
        count: u64,
        guests: &mut [Guest],
        cell: impl Fn(&mut Guest) -> Result<()>,
    ) -> Result<Self> {
        let mut took = Vec::new();
        for round in 0..=ROUNDS {
            let times = guests.iter_mut().map(|guest| guest.time(&cell));
            let times = times.collect::<Result<Vec<_>>>()?;
            if round > 0 {
                took.push(times);
            }
        }
        Ok(Self { name, count, took })
    }

    /// The modes' medians, and the shares of the first mode's time in the same round.
    fn figures(&self) -> Value {
        let modes = MODES.iter().enumerate().map(|(place, mode)| {
            let of = |value: &dyn Fn(&[Took]) -> f64| {
                let mut values: Vec<_> = self.took.iter().map(|round| value(round)).collect();
                values.sort_by(f64::total_cmp);
                [
                    values[ROUNDS / 2],
                    values[0],
                    values[values.len() - 1],
                ]
            };
            let each = 1e6 / self.count as f64;
            json!({
                "mode": mode.name,
                "us_each": of(&|round| round[place].all.as_secs_f64() * each)[0],
                "vcpu_us_each": of(&|round| round[place].vcpu.as_secs_f64() * each)[0],
                "share_of_shared": of(&|round| round[0].all.as_secs_f64() / round[place].all.as_secs_f64()),
                "vcpu_time_to_shared": of(&|round| round[place].vcpu.as_secs_f64() / round[0].vcpu.as_secs_f64()),
            })
        });
        json!({ "cell": self.name, "modes": modes.collect::<Vec<_>>() })
    }
}

fn side_by_side(context: &Context) -> Result<()> {
    context.step("boot");
    let mut guests = Vec::new();
    for (mode, number) in MODES.iter().zip(1..) {
        guests.push(Guest::boot(context, mode, number)?);
    }
    context.check("modes.disk", || {
        let mut cells = Vec::new();
        for (kib, count) in BLOCKS {
            for (name, from, to, flag) in [
                ("read", "/dev/vda", "/dev/null", "iflag"),
                ("write", "/dev/zero", "/dev/vda", "oflag"),
            ] {
                let command = format!(
                    "dd if={from} of={to} bs={kib}k count={count} {flag}=direct 2>/dev/null"
                );
                let cell =
                    |guest: &mut Guest| guest.vm.console.sh_within(&command, LIMIT).map(drop);
                let name = format!("{name} {kib} KiB");
                cells.push(Cell::measure(name, count, &mut guests, cell)?.figures());
            }
        }
        note(context, "modes-disk", &json!(cells))
    })?;
    context.check("modes.net", || {
        let figures = card(context, &mut guests)?;
        note(context, "modes-net", &figures)
    })?;
    guests.iter_mut().try_for_each(|guest| guest.vm.power_off())
}

/// A page of 16 MiB each way, by HTTP.
fn card(context: &Context, guests: &mut [Guest]) -> Result<Value> {
    let page = context.scratch("page");
    image::random(&page, PAGE, 5)?;
    let to_guest = Cell::measure("to the guest".to_owned(), PAGE >> 10, guests, |guest| {
        let server = net::PageServer::start(guest.host, &page)?;
        let wget = format!("wget -q -O /dev/null {}", server.url());
        guest.vm.console.sh_within(&wget, LIMIT).map(drop)
    })?;
    let back = context.scratch("back");
    let from_guest = Cell::measure("from the guest".to_owned(), PAGE >> 10, guests, |guest| {
        let received = net::fetch((guest.address, 80).into(), "/page", &back, LIMIT)?;
        anyhow::ensure!(
            received == PAGE,
            "{} sent {received} bytes",
            guest.mode.name
        );
        Ok(())
    })?;
    Ok(json!([to_guest.figures(), from_guest.figures()]))
}
