//! What there is to run: the suite's `unittests.cfg`, read.
//!
//! One test a section, `key = value` lines. Values are the shell's words, as the suite's own runner gives
//! them to a shell: quotes are taken off, and `` `date +%s` `` becomes the time. Only what x86 has is known.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};

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

/// Built by the suite and not in its list.
const UNLISTED: &str = "\
[tscdeadline_latency]
file = tscdeadline_latency.flat
qemu_params = -cpu qemu64,+x2apic,+tsc-deadline
test_args = '200000 100'
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
    /// Arguments, one text.
    pub args: String,
    /// More arguments of QEMU, words.
    pub params: Vec<String>,
    /// Seconds that it may take.
    pub timeout_s: u64,
    /// Why it cannot run on any machine here.
    pub skip: Option<String>,
}

impl Test {
    fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            file: String::new(),
            smp: 1,
            args: String::new(),
            params: Vec::new(),
            timeout_s: 90,
            skip: None,
        }
    }

    /// The program's name.
    #[must_use]
    pub fn program(&self) -> &str {
        self.file.strip_suffix(".flat").unwrap_or(&self.file)
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

    /// Its memory in MiB: QEMU's default unless it says.
    #[must_use]
    pub fn memory_mib(&self) -> u64 {
        let text = self.param("-m").unwrap_or("128");
        match text.strip_suffix(['g', 'G']) {
            Some(gib) => gib.parse::<u64>().map_or(128, |gib| gib * 1024),
            None => text.trim_end_matches(['m', 'M']).parse().unwrap_or(128),
        }
    }

    fn set(&mut self, key: &str, value: &str) -> Result<()> {
        match key {
            "file" => value.clone_into(&mut self.file),
            "smp" => self.smp = value.parse().with_context(|| format!("smp = {value}"))?,
            "test_args" => self.args = words(value).into_iter().next().unwrap_or_default(),
            "qemu_params" | "extra_params" => self.params = words(value),
            "timeout" => {
                let seconds = value.trim_end_matches('s');
                self.timeout_s = seconds
                    .parse()
                    .with_context(|| format!("timeout = {value}"))?;
            }
            "arch" if value != "x86_64" => self.skip = Some(format!("{value} only")),
            "accel" if value != "kvm" => self.skip = Some(format!("accelerator {value} only")),
            "groups" if value.split_whitespace().any(|group| group == "nodefault") => {
                self.skip = Some("to be run by hand only".to_owned());
            }
            "check" => self.skip = value.split_whitespace().find_map(unmet),
            _ => {}
        }
        Ok(())
    }
}

/// Why a file does not hold what it should: `PATH=VALUE`.
fn unmet(check: &str) -> Option<String> {
    let (path, wanted) = check.split_once('=')?;
    let found = std::fs::read_to_string(path).unwrap_or_default();
    (found.trim_end() != wanted).then(|| format!("{path} is not {wanted}"))
}

/// The tests of a built suite, in its order, those of [`PROGRAMS`] alone unless `all`.
///
/// # Errors
/// There is no suite, or its list cannot be read.
pub fn read(suite: &Path, all: bool) -> Result<Vec<Test>> {
    let path = suite.join("x86/unittests.cfg");
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let mut tests = parse(&text)?;
    tests.extend(parse(UNLISTED)?);
    tests.retain(|test| all || PROGRAMS.contains(&test.program()));
    ensure!(!tests.is_empty(), "{} lists no test", path.display());
    Ok(tests)
}

/// The tests of a list.
///
/// # Errors
/// A number that is none.
pub fn parse(text: &str) -> Result<Vec<Test>> {
    let mut tests: Vec<Test> = Vec::new();
    for line in text.lines().map(str::trim) {
        let section = line
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'));
        if let Some(name) = section {
            tests.push(Test::new(name));
        } else if let Some((key, value)) = line.split_once('=')
            && !line.starts_with('#')
            && let Some(test) = tests.last_mut()
        {
            test.set(key.trim(), value.trim())?;
        }
    }
    tests.retain(|test| !test.file.is_empty());
    Ok(tests)
}

/// The shell's words of a text.
fn words(text: &str) -> Vec<String> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.map_or(0, |since| since.as_secs());
    let text = text.replace("`date +%s`", &now.to_string());
    let mut words = Vec::new();
    let mut word = None;
    let mut quote = None;
    for c in text.chars() {
        match c {
            _ if quote == Some(c) => quote = None,
            '\'' | '"' if quote.is_none() => {
                quote = Some(c);
                word.get_or_insert_with(String::new);
            }
            ' ' | '\t' if quote.is_none() => words.extend(word.take()),
            _ => word.get_or_insert_with(String::new).push(c),
        }
    }
    words.extend(word);
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = "\
# [not_a_test]
[x2apic]
file = apic.flat
smp = 2
qemu_params = -cpu qemu64,+x2apic,-pcid -m 2g
arch = x86_64
timeout = 30
groups = apic

[clock]
file = kvmclock_test.flat
test_args = \"10000000 `date +%s`\"

[by_hand]
file = access.flat
test_args = 'a b' c
groups = vmx nodefault

[old]
file = cmpxchg8b.flat
arch = i386
";

    #[test]
    fn a_list_is_read_as_the_suite_does() {
        let tests = parse(LIST).expect("a list");
        let names: Vec<_> = tests.iter().map(|test| test.name.as_str()).collect();
        assert_eq!(names, ["x2apic", "clock", "by_hand", "old"]);
        let apic = &tests[0];
        assert_eq!((apic.program(), apic.smp, apic.timeout_s), ("apic", 2, 30));
        assert_eq!(apic.features(), ["+x2apic", "-pcid"]);
        assert_eq!((apic.memory_mib(), &apic.skip), (2048, &None));
        let (start, seconds) = tests[1].args.split_once(' ').expect("two words");
        assert_eq!((start, tests[1].timeout_s), ("10000000", 90));
        assert!(seconds.parse::<u64>().expect("a time") > 1_700_000_000);
        assert_eq!(tests[2].args, "a b");
        assert!(tests[2].skip.is_some() && tests[3].skip.is_some());
    }

    #[test]
    fn a_check_of_a_file_decides() {
        assert_eq!(
            unmet("/proc/self/comm=no such name").as_deref().map(|_| ()),
            Some(())
        );
        assert!(unmet("/nowhere=Y").is_some());
        assert!(unmet("/proc/sys/kernel/ostype=Linux").is_none());
    }

    #[test]
    fn numbers_that_are_none_are_named() {
        let error = parse("[a]\nsmp = many").expect_err("no number");
        assert!(error.to_string().contains("smp = many"), "{error}");
    }
}
