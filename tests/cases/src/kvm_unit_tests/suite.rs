//! What there is to run: the tests of a built suite, and what each asks of its machine.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};

use super::list;

/// Programs of the suite that say something about interrupts, timers and vCPUs.
pub const PROGRAMS: [&str; 15] = [
    "apic",
    "eventinj",
    "hypercall",
    "idt_test",
    "ioapic",
    "kvmclock_test",
    "msr",
    "pcid",
    "realmode",
    "sieve",
    "smptest",
    "tsc",
    "tsc_adjust",
    "tscdeadline_latency",
    "vmexit",
];

/// Built by the suite and not in its list. Its arguments are cycles between two interrupts, which go on while it
/// prints: far enough apart that an emulated processor comes to print between them.
const UNLISTED: &str = "\
[tscdeadline_latency]
file = tscdeadline_latency.flat
qemu_params = -cpu qemu64,+x2apic,+tsc-deadline
test_args = '20000000 50'
";

/// One test.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Test {
    /// Its name.
    pub name: String,
    /// Program, below the folder `x86`.
    pub file: String,
    /// Processors.
    pub smp: u8,
    /// Arguments, one text, as the list has it: [`Test::args_at`].
    pub args: String,
    /// More arguments of QEMU, words.
    pub params: Vec<String>,
    /// Its memory in MiB.
    pub memory_mib: u64,
    /// Seconds that it may take.
    pub timeout_s: u64,
    /// Why it cannot run on any machine here.
    pub skip: Option<String>,
}

/// The one command that x86's list asks a shell to run.
pub(super) const DATE: &str = "`date +%s`";
/// QEMU's, where a test does not say.
const DEFAULT_MEMORY_MIB: u64 = 128;

impl Test {
    /// What a test is that says nothing.
    pub(super) fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            file: String::new(),
            smp: 1,
            args: String::new(),
            params: Vec::new(),
            memory_mib: DEFAULT_MEMORY_MIB,
            timeout_s: 90,
            skip: None,
        }
    }

    /// The program's name.
    #[must_use]
    pub fn program(&self) -> &str {
        self.file.strip_suffix(".flat").unwrap_or(&self.file)
    }

    /// Its arguments for a run that starts now: a program compares the host's clock with its own.
    #[must_use]
    pub fn args_at(&self, now: SystemTime) -> String {
        let now = now.duration_since(UNIX_EPOCH);
        let now = now.map_or(0, |since| since.as_secs());
        self.args.replace(DATE, &now.to_string())
    }

    /// The value behind one of QEMU's options.
    #[must_use]
    pub fn param(&self, option: &str) -> Option<&str> {
        let at = self.params.iter().position(|word| word == option)?;
        self.params.get(at + 1).map(String::as_str)
    }

    /// Features of the processor that it asks for, each with its sign.
    #[must_use]
    pub fn features(&self) -> Vec<&str> {
        let words = self.param("-cpu").unwrap_or_default().split(',').skip(1);
        words.filter(|word| word.starts_with(['+', '-'])).collect()
    }
}

/// The tests of a built suite, in its order, those of [`PROGRAMS`] alone unless `all`.
///
/// # Errors
/// There is no suite, or its list cannot be read.
pub fn read(suite: &Path, all: bool) -> Result<Vec<Test>> {
    let path = suite.join("x86/unittests.cfg");
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let mut tests = list::parse(&text).with_context(|| path.display().to_string())?;
    tests.extend(list::parse(UNLISTED)?);
    tests.retain(|test| all || PROGRAMS.contains(&test.program()));
    ensure!(!tests.is_empty(), "{} lists no test", path.display());
    Ok(tests)
}
