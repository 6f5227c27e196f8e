//! `berth-perf run`: scenario after scenario, and what was measured so far always on disk.
//!
//! ```text
//!  choose ─▶ for each scenario: look at the host's noise ─▶ prepare ─▶ cells (engine) ─▶ results.json
//!            then: look again ─▶ withdraw verdicts that were too noisy ─▶ clear up ─▶ table, report.html
//! ```
//! Each scenario has a thread of its own, which it may move to other namespaces and pin; its daemons die with it.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};

use crate::args::RunArgs;
use crate::choose::{self, Chosen};
use crate::clock::{Window, now};
use crate::context::{Build, Context, source_tree};
use crate::engine::{self, Order};
use crate::host::{Facts, Noise};
use crate::interrupt;
use crate::janitor::Janitor;
use crate::lab;
use crate::peers;
use crate::progress::Progress;
use crate::report;
use crate::results::{self, MetricInfo, Results, Role, ScenarioResult};
use crate::scenario::{Entry, Metric, Need};
use crate::sys;
use crate::verdict;

/// Measures, prints, and clears up. Whether all that was named could be measured.
pub fn run(args: &RunArgs) -> Result<bool> {
    let chosen = choose::choose(args)?;
    let builds = builds(args)?;
    let out = out_folder(args)?;
    interrupt::install()?;
    let mut context = context(args, builds)?;
    let in_lab = context.in_lab;
    let mut results = begun(args, &chosen, &out, in_lab)?;
    eprintln!("host: {}", results.host.line());
    let mut keeper = Keeper {
        results: &mut results,
        out: &out,
        stream: args.stream,
    };
    let measured = measure_all(args, &chosen, &mut context, &mut keeper);
    let cleared = context.janitor.finish();
    results.absent.extend(context.absent.iter().cloned());
    results.absent.sort();
    results.absent.dedup();
    results.interrupted = interrupt::requested();
    results.write(&out)?;
    report::write_page(&results, &out.join(report::PAGE))?;
    print!("{}", report::text(&results));
    println!("\nresults: {}", out.join(results::FILE).display());
    println!("report:  {}", out.join(report::PAGE).display());
    measured.and(cleared)?;
    if results.interrupted {
        bail!("stopped before the end; what was measured is kept");
    }
    Ok(failures(&chosen, &results))
}

/// A run without anything measured yet, or with what `--add` finds.
fn begun(args: &RunArgs, chosen: &[Chosen], out: &Path, in_lab: bool) -> Result<Results> {
    let mut results = Results {
        format: results::VERSION,
        date: now(),
        quick: args.quick,
        host: Facts::gather(args.awake.to_string(), in_lab),
        ..Results::default()
    };
    git(&mut results);
    if !args.add {
        return Ok(results);
    }
    let mut earlier = Results::read(out)?;
    if earlier.host != results.host || earlier.quick != args.quick {
        bail!(
            "--add: the run in {} is of another host, or was made in another way",
            out.display()
        );
    }
    let names: Vec<&str> = chosen.iter().map(|one| one.entry.name).collect();
    earlier.forget(&names);
    earlier.interrupted = false;
    Ok(earlier)
}

/// Whether nothing of ours failed, and nothing that was asked for by its name.
fn failures(chosen: &[Chosen], results: &Results) -> bool {
    let mut fine = true;
    for scenario in &results.scenarios {
        let named = chosen
            .iter()
            .any(|one| one.named && one.entry.name == scenario.name);
        if let Some(failure) = scenario.failure.as_ref().filter(|_| named) {
            eprintln!("berth-perf: {}: {failure}", scenario.name);
            fine = false;
        }
        for cell in &scenario.cells {
            let ours = cell
                .series
                .iter()
                .filter(|series| series.role == Role::Ours);
            for series in ours {
                if let Some(failure) = &series.failure {
                    eprintln!("berth-perf: {} in {}: {failure}", series.subject, cell.name);
                    fine = false;
                }
            }
        }
    }
    fine
}

fn context(args: &RunArgs, builds: Vec<Build>) -> Result<Context> {
    let mut janitor = Janitor::start()?;
    let directory = args.dir.join(format!("berth-perf-{}", std::process::id()));
    janitor.directory(&directory)?;
    fs::create_dir(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
    let measured =
        Duration::from_millis(args.run_ms.unwrap_or(if args.quick { 500 } else { 1500 }));
    Ok(Context {
        cells: Vec::new(),
        quick: args.quick,
        window: Window {
            warmup: measured / 5,
            measured,
        },
        client_cpu: args.client_cpu,
        daemon_cpu: args.daemon_cpu,
        awake: args.awake,
        directory,
        in_lab: std::env::var_os("BERTH_LAB").is_some(),
        janitor,
        variants: args.variant.clone(),
        count: !args.no_counts,
        builds,
        against: args.against.clone(),
        named: args.peer.clone(),
        assets: args.assets.clone(),
        zram_mib: args.zram_mib,
        file_mib: args.file_mib,
        absent: Vec::new(),
    })
}

/// Where our programs are: `--builds`, or the folder of this one.
fn builds(args: &RunArgs) -> Result<Vec<Build>> {
    if args.builds.is_empty() {
        let program = std::env::current_exe().context("cannot find this program")?;
        let folder = program.parent().unwrap_or(Path::new("/")).to_owned();
        let label = String::new();
        return Ok(vec![Build { label, folder }]);
    }
    let mut builds: Vec<Build> = Vec::new();
    for (index, folder) in args.builds.iter().enumerate() {
        if !folder.is_dir() {
            bail!("--builds {}: no such folder", folder.display());
        }
        let last = folder
            .file_name()
            .map(|name| name.to_string_lossy().into_owned());
        let label = last.unwrap_or_default();
        let taken = label.is_empty() || builds.iter().any(|build| build.label == label);
        builds.push(Build {
            label: if taken {
                format!("{label}{index}")
            } else {
                label
            },
            folder: folder.clone(),
        });
    }
    Ok(builds)
}

fn out_folder(args: &RunArgs) -> Result<PathBuf> {
    let out = match &args.out {
        Some(out) => out.clone(),
        None => {
            let tree = source_tree().map_or_else(|| PathBuf::from("."), |tree| tree.join("target"));
            tree.join("perf").join(now().replace(':', ""))
        }
    };
    fs::create_dir_all(&out).with_context(|| format!("cannot create {}", out.display()))?;
    Ok(out)
}

/// Results on their way to disk.
struct Keeper<'a> {
    results: &'a mut Results,
    out: &'a Path,
    stream: bool,
}

impl Keeper<'_> {
    /// Writes what there is, with a scenario that is not through yet.
    fn keep(&self, scenario: &ScenarioResult, names: &Names) -> Result<()> {
        let mut results = self.results.clone();
        results.interrupted = true;
        results.add(scenario.clone(), names);
        self.write(&results)
    }

    fn write(&self, results: &Results) -> Result<()> {
        if self.stream {
            let json = serde_json::to_string(results).context("results as JSON")?;
            println!("{}{json}", lab::RESULTS);
        }
        results.write(self.out)
    }
}

fn measure_all(
    args: &RunArgs,
    chosen: &[Chosen],
    context: &mut Context,
    keeper: &mut Keeper,
) -> Result<()> {
    let order = Order {
        subjects: wanted(args),
        reference: args.limit.clone(),
        rounds: args.rounds,
        quick: args.quick,
        count: !args.no_counts,
    };
    let (guests, others): (Vec<&Chosen>, Vec<&Chosen>) =
        chosen.iter().partition(|one| lab::needs_guests(one));
    let place = match guests.is_empty() {
        true => Ok(false),
        false => lab::wanted(args, context),
    };
    let here: Vec<&Chosen> = match place {
        Ok(false) => chosen.iter().collect(),
        _ => others,
    };
    let mut progress = Progress::default();
    let cpus = [context.client_cpu, context.daemon_cpu];
    for (index, one) in here.iter().enumerate() {
        if interrupt::requested() {
            break;
        }
        let later = here[index + 1..]
            .iter()
            .map(|next| (next.entry.expected)(args.quick));
        progress.begin(one.entry.name, 0, later.sum());
        let noise = Noise::look(one.entry.name, &cpus)?;
        progress.say(&noise.line());
        keeper.results.noise.push(noise);
        let names = names(one);
        let scenario = measure(one, context, &order, &mut progress, &|scenario| {
            keeper.keep(scenario, &names)
        });
        progress.clear();
        add(keeper, scenario, &names)?;
    }
    if let Err(error) = &place {
        for one in &guests {
            let failed = ScenarioResult {
                failure: Some(format!("{error:#}")),
                ..blank(one, false)
            };
            add(keeper, failed, &Names::new())?;
        }
    } else if here.len() < chosen.len() && !interrupt::requested() {
        in_lab(args, &guests, context, &mut progress, keeper)?;
    }
    keeper.results.noise.push(Noise::look("after all", &cpus)?);
    keeper.results.withdraw();
    keeper.write(keeper.results)
}

fn add(keeper: &mut Keeper, scenario: ScenarioResult, names: &Names) -> Result<()> {
    if let Some(failure) = &scenario.failure {
        eprintln!("not measured: {}: {failure}", scenario.name);
    }
    keeper.results.add(scenario, names);
    keeper.write(keeper.results)
}

/// Adds what the lab tells. What it could not measure says so.
fn in_lab(
    args: &RunArgs,
    guests: &[&Chosen],
    context: &mut Context,
    progress: &mut Progress,
    keeper: &mut Keeper,
) -> Result<()> {
    progress.begin("lab", 0, Duration::ZERO);
    progress.say("booting");
    let before = keeper.results.clone();
    let outcome = lab::run(args, guests, context, progress, |inside| {
        let mut all = before.clone();
        all.interrupted = true;
        all.take_in(inside);
        keeper.write(&all)?;
        *keeper.results = all;
        Ok(())
    });
    progress.clear();
    keeper.results.interrupted = false;
    if let Err(error) = outcome {
        for one in guests {
            let there = keeper
                .results
                .scenarios
                .iter()
                .any(|done| done.name == one.entry.name);
            if !there {
                let failed = ScenarioResult {
                    failure: Some(format!("{error:#}")),
                    ..blank(one, true)
                };
                add(keeper, failed, &Names::new())?;
            }
        }
    }
    Ok(())
}

/// `--subject`, with `--variant`, which is wanted where it is named.
fn wanted(args: &RunArgs) -> Vec<String> {
    let mut wanted = args.subject.clone();
    if !wanted.is_empty() {
        wanted.extend(args.variant.iter().map(|variant| variant.name.clone()));
    }
    wanted
}

/// Cloud Hypervisor's names by cell and metric.
type Names = BTreeMap<(String, String), String>;

fn names(one: &Chosen) -> Names {
    let mut names = BTreeMap::new();
    for cell in &one.cells {
        for (metric, theirs) in &cell.names {
            let key = (cell.name.clone(), (*metric).to_owned());
            names.insert(key, (*theirs).to_owned());
        }
    }
    names
}

/// A result without any yet.
fn blank(one: &Chosen, emulated: bool) -> ScenarioResult {
    ScenarioResult {
        name: one.entry.name.to_owned(),
        about: one.entry.about.to_owned(),
        emulated,
        metrics: one.entry.metrics.iter().map(Metric::info).collect(),
        ..ScenarioResult::default()
    }
}

/// After every cell.
type Keep<'a> = &'a (dyn Fn(&ScenarioResult) -> Result<()> + Sync);

/// One scenario on a thread of its own. Whatever fails is in the result.
fn measure(
    one: &Chosen,
    context: &mut Context,
    order: &Order,
    progress: &mut Progress,
    keep: Keep,
) -> ScenarioResult {
    let mut result = blank(one, context.in_lab);
    let outcome = lacking(one.entry).and_then(|()| {
        let result = &mut result;
        std::thread::scope(|scope| {
            let work = move || cells(one, context, order, progress, (result, keep));
            let thread = std::thread::Builder::new().name(one.entry.name.to_owned());
            let thread = thread.spawn_scoped(scope, work)?;
            thread
                .join()
                .unwrap_or_else(|_| Err(anyhow!("it panicked")))
        })
    });
    if let Err(error) = outcome {
        result.failure = Some(format!("{error:#}"));
    }
    result
}

fn cells(
    one: &Chosen,
    context: &mut Context,
    order: &Order,
    progress: &mut Progress,
    (result, keep): (&mut ScenarioResult, Keep),
) -> Result<()> {
    context.cells.clone_from(&one.cells);
    progress.say("preparing");
    let mut scenario = (one.entry.prepare)(context)?;
    let subjects = scenario.subjects();
    let there = |name: &String| subjects.iter().any(|subject| subject.name == *name);
    if let Some(limit) = order.reference.as_ref().filter(|name| !there(name)) {
        let names: Vec<&str> = subjects
            .iter()
            .map(|subject| subject.name.as_str())
            .collect();
        bail!("{}", peers::unknown("subject", limit, &names));
    }
    if !order.subjects.is_empty() && !order.subjects.iter().any(there) {
        let names: Vec<&str> = subjects
            .iter()
            .map(|subject| subject.name.as_str())
            .collect();
        bail!("{}", peers::unknown("subject", &order.subjects[0], &names));
    }
    let steps = |cell| engine::steps(scenario.as_ref(), &subjects, cell, order);
    let total = one.cells.iter().map(steps).sum();
    progress.total(total);
    for cell in &one.cells {
        if interrupt::requested() {
            break;
        }
        let scenario = scenario.as_mut();
        let metrics = one.entry.metrics;
        let cell = engine::cell(scenario, &subjects, cell, metrics, order, progress);
        result.cells.push(cell);
        keep(result)?;
    }
    Ok(())
}

/// An error that says what is missing and how to get it.
fn lacking(entry: &Entry) -> Result<()> {
    for need in entry.needs {
        match need {
            Need::Root if !sys::is_root() => {
                bail!("needs the rights of the superuser: run it as root")
            }
            Need::Kvm | Need::Guest => {
                let kvm = fs::File::options().read(true).write(true).open("/dev/kvm");
                kvm.context("needs /dev/kvm (load the module kvm, join the group kvm)")?;
            }
            Need::Tool { program, how } if peers::on_path(program).is_none() => {
                bail!("no {program}: {how}");
            }
            Need::Root | Need::Tool { .. } => {}
        }
    }
    Ok(())
}

/// What the source tree around us is.
fn git(results: &mut Results) {
    let Some(tree) = source_tree() else { return };
    let ask = |arguments: &[&str]| {
        let output = Command::new("git")
            .arg("-C")
            .arg(&tree)
            .args(arguments)
            .output();
        let output = output.ok().filter(|output| output.status.success());
        let text = output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
        text.unwrap_or_default()
    };
    results.git_human_readable = ask(&["describe", "--always", "--dirty", "--tags"]);
    results.git_revision = ask(&["rev-parse", "HEAD"]);
    results.git_commit_date = ask(&["show", "-s", "--format=%cI", "HEAD"]);
}

impl Metric {
    fn info(&self) -> MetricInfo {
        MetricInfo {
            name: self.name.to_owned(),
            unit: self.unit.to_owned(),
            better: self.better,
            about: self.about.to_owned(),
        }
    }
}

impl Results {
    /// Adds what was measured in the lab.
    fn take_in(&mut self, inside: &Results) {
        self.results.extend(inside.results.iter().cloned());
        self.scenarios.extend(inside.scenarios.iter().cloned());
        self.absent.extend(inside.absent.iter().cloned());
    }

    /// Takes back the verdicts of scenarios before or after which the host was too noisy.
    fn withdraw(&mut self) {
        let looks: Vec<Noise> = self.noise.clone();
        for scenario in &mut self.scenarios {
            let Some(at) = looks.iter().position(|look| look.when == scenario.name) else {
                continue;
            };
            let around = looks[at..].iter().take(2);
            if let Some(look) = around.clone().find(|look| look.too_noisy()) {
                verdict::withdraw(scenario, &look.line());
            }
        }
    }
}
