//! `unittests.cfg`, read as the suite's own runner (`scripts/common.bash`) does.
//!
//! One test a section, `key = value` lines; unknown keys and what comes before the first section are passed
//! over. The suite gives values to a shell, so they are the shell's words: quotes are taken off. `` `date +%s` ``
//! stays, as only the start of a run knows it. QEMU's arguments may go over several lines:
//!
//! ```text
//!   [name]
//!   file = apic.flat
//!   qemu_params = """-cpu max \
//!       -m 2g"""
//! ```
//!
//! What only a shell could tell (`$MAX_SMP`, `disabled_if`) is in the lists of other architectures than x86: such
//! a test is left out, and says so. Errors name the line.

use anyhow::{Context as _, Result, anyhow, bail};

use super::suite::{DATE, Test};

/// No test takes longer.
const DAY_S: u64 = 86_400;
/// Begins and ends a value of several lines.
const LONG: &str = "\"\"\"";

/// The tests of a list.
///
/// # Errors
/// A number that is none, a quote without an end.
pub fn parse(text: &str) -> Result<Vec<Test>> {
    let mut tests: Vec<Test> = Vec::new();
    let mut lines = (1..).zip(text.lines().map(str::trim));
    while let Some((number, line)) = lines.next() {
        if let Some(name) = section(line) {
            tests.push(Test::new(name));
            continue;
        }
        let Some((key, value)) = line.split_once('=') else {
            continue;
        };
        let (key, value) = (key.trim(), value.trim());
        let long = match value.strip_prefix(LONG) {
            Some(first) if is_params(key) => Some(rest_of(first, &mut lines)),
            _ => None,
        };
        let Some(test) = tests.last_mut().filter(|_| !line.starts_with('#')) else {
            continue;
        };
        let done = match long.transpose() {
            Ok(long) => set(test, key, long.as_deref().unwrap_or(value)),
            Err(error) => Err(error),
        };
        done.with_context(|| format!("line {number}: {line}"))?;
    }
    tests.retain(|test| !test.file.is_empty());
    Ok(tests)
}

fn section(line: &str) -> Option<&str> {
    line.strip_prefix('[')?.strip_suffix(']')
}

fn is_params(key: &str) -> bool {
    matches!(key, "qemu_params" | "extra_params")
}

/// What follows [`LONG`] up to the next, a backslash at a line's end joining it to the next line.
fn rest_of<'a>(first: &str, lines: &mut impl Iterator<Item = (usize, &'a str)>) -> Result<String> {
    let mut value = String::new();
    let mut line = first;
    loop {
        if let Some(last) = line.strip_suffix(LONG) {
            value.push_str(last);
            return Ok(value);
        }
        match line.strip_suffix('\\') {
            Some(joined) if !joined.ends_with('\\') => value.push_str(joined),
            _ => {
                value.push_str(line);
                value.push('\n');
            }
        }
        line = lines
            .next()
            .map(|(_, line)| line)
            .with_context(|| format!("no {LONG} ends it"))?;
    }
}

fn set(test: &mut Test, key: &str, value: &str) -> Result<()> {
    match key {
        "file" => value.clone_into(&mut test.file),
        "smp" if needs_a_shell(value) => leave_out(test, key),
        "smp" => {
            test.smp = value
                .parse()
                .ok()
                .filter(|count| *count > 0)
                .ok_or_else(|| anyhow!("not a number of processors from 1 to 255"))?;
        }
        "test_args" | "qemu_params" | "extra_params" if needs_a_shell(value) => {
            leave_out(test, key);
        }
        "test_args" => test.args = words(value)?.into_iter().next().unwrap_or_default(),
        "qemu_params" | "extra_params" => {
            test.params = words(value)?;
            if let Some(memory) = test.param("-m") {
                test.memory_mib = mebibytes(memory)?;
            }
        }
        "timeout" => {
            let seconds = value.strip_suffix('s').unwrap_or(value);
            test.timeout_s = seconds
                .parse()
                .ok()
                .filter(|seconds| (1..=DAY_S).contains(seconds))
                .ok_or_else(|| anyhow!("not a number of seconds, a day at most"))?;
        }
        "arch" if value != "x86_64" => test.skip = Some(format!("{value} only")),
        // There is one machine type; `-machine` of the arguments is QEMU's alone.
        "machine" if !value.is_empty() => test.skip = Some(format!("machine {value} only")),
        "accel" if value != "kvm" => test.skip = Some(format!("accelerator {value} only")),
        "disabled_if" => leave_out(test, key),
        "groups" if value.split_whitespace().any(|group| group == "nodefault") => {
            test.skip = Some("to be run by hand only".to_owned());
        }
        "check" => {
            for check in value.split_whitespace() {
                if let Some(reason) = unmet(check)? {
                    test.skip = Some(reason);
                    break;
                }
            }
        }
        _ => {}
    }
    Ok(())
}

fn leave_out(test: &mut Test, key: &str) {
    test.skip = Some(format!("its {key} needs a shell"));
}

fn needs_a_shell(value: &str) -> bool {
    value.contains('$') || value.replace(DATE, "").contains('`')
}

/// A size as QEMU's `-m` takes it: MiB, or with the letter of another unit.
fn mebibytes(text: &str) -> Result<u64> {
    let (digits, unit) = match text.to_ascii_lowercase().strip_suffix('g') {
        Some(digits) => (digits.to_owned(), 1024),
        None => (text.trim_end_matches(['m', 'M']).to_owned(), 1),
    };
    let count = digits.parse::<u64>().ok().filter(|count| *count > 0);
    count
        .and_then(|count| count.checked_mul(unit))
        .ok_or_else(|| anyhow!("-m {text} is not a size"))
}

/// Why a file does not hold what it should: `PATH=VALUE`.
fn unmet(check: &str) -> Result<Option<String>> {
    let Some((path, wanted)) = check.split_once('=') else {
        bail!("'{check}' is not PATH=VALUE");
    };
    let found = std::fs::read_to_string(path).ok();
    let found = found.as_deref().map(|text| text.trim_end_matches('\n'));
    Ok((found != Some(wanted)).then(|| format!("{path} is not {wanted}")))
}

/// The shell's words of a text.
fn words(text: &str) -> Result<Vec<String>> {
    let mut words = Vec::new();
    let mut word = None;
    let mut quote = None;
    let mut escaped = false;
    for c in text.chars() {
        match c {
            _ if escaped => {
                escaped = false;
                word.get_or_insert_with(String::new).push(c);
            }
            '\\' if quote != Some('\'') => escaped = true,
            _ if quote == Some(c) => quote = None,
            '\'' | '"' if quote.is_none() => {
                quote = Some(c);
                word.get_or_insert_with(String::new);
            }
            _ if quote.is_none() && c.is_whitespace() => words.extend(word.take()),
            _ => word.get_or_insert_with(String::new).push(c),
        }
    }
    if let Some(quote) = quote {
        bail!("no {quote} ends it");
    }
    words.extend(word);
    Ok(words)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    const LIST: &str = "\
# [not_a_test]
smp = of no test
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

    fn one(lines: &str) -> Test {
        let text = format!("[a]\nfile = a.flat\n{lines}\n");
        let mut tests = parse(&text).expect("a list");
        assert_eq!(tests.len(), 1);
        tests.remove(0)
    }

    fn skip_of(lines: &str) -> String {
        one(lines).skip.unwrap_or_default()
    }

    #[test]
    fn a_list_is_read_as_the_suite_does() {
        let tests = parse(LIST).expect("a list");
        let names: Vec<_> = tests.iter().map(|test| test.name.as_str()).collect();
        assert_eq!(names, ["x2apic", "clock", "by_hand", "old"]);
        let apic = &tests[0];
        assert_eq!((apic.program(), apic.smp, apic.timeout_s), ("apic", 2, 30));
        assert_eq!(apic.features(), ["+x2apic", "-pcid"]);
        assert_eq!((apic.memory_mib, &apic.skip), (2048, &None));
        let args = tests[1].args_at(UNIX_EPOCH + Duration::from_secs(1_700_000_000));
        assert_eq!(
            (args.as_str(), tests[1].timeout_s),
            ("10000000 1700000000", 90)
        );
        assert_eq!((tests[2].args.as_str(), tests[2].memory_mib), ("a b", 128));
        assert!(tests[2].skip.is_some() && tests[3].skip.is_some());
    }

    #[test]
    fn arguments_go_over_several_lines() {
        let lines =
            "extra_params = \"\"\"-cpu max,+x2apic \\\n  -m 512 \\\n-append 'a\nb'\"\"\"\nsmp = 3";
        let test = one(lines);
        assert_eq!(
            test.params,
            ["-cpu", "max,+x2apic", "-m", "512", "-append", "a\nb"]
        );
        assert_eq!((test.smp, test.memory_mib), (3, 512));
        // What is in them is no section and no key.
        let test = one("qemu_params = \"\"\"-cpu max\n[b]\nsmp = 7\n\"\"\"");
        assert_eq!((test.smp, test.params.len()), (1, 6));
        // Three quotes are the shell's own where there is one line only.
        assert_eq!(one("qemu_params = \"\"\"-m 1g\"\"\"").memory_mib, 1024);
        assert_eq!(one("test_args = \"\"\"a b\"\"\"").args, "a b");
    }

    #[test]
    fn words_are_the_shells() {
        let read = |text| words(text).expect("words");
        assert_eq!(read(r#"-a "b 'c' d" 'e "f'g"#), ["-a", "b 'c' d", "e \"fg"]);
        assert_eq!(read(r"a\ b '\c' ''"), ["a b", r"\c", ""]);
        assert_eq!(read(" \t "), [""; 0]);
    }

    #[test]
    fn what_cannot_run_here_says_why() {
        assert_eq!(skip_of("machine = q35"), "machine q35 only");
        assert_eq!(skip_of("accel = tcg"), "accelerator tcg only");
        assert_eq!(skip_of("smp = $MAX_SMP"), "its smp needs a shell");
        assert_eq!(skip_of("test_args = `id`"), "its test_args needs a shell");
        assert_eq!(
            skip_of("disabled_if = true"),
            "its disabled_if needs a shell"
        );
        let checks = "check = /proc/sys/kernel/ostype=Linux /nowhere=Y";
        assert_eq!(skip_of(checks), "/nowhere is not Y");
        assert_eq!(skip_of("check = /proc/sys/kernel/ostype=Linux"), "");
        // A file that is missing has not even nothing in it.
        assert_eq!(skip_of("check = /nowhere="), "/nowhere is not ");
        assert_eq!(skip_of("groups = apic\narch = x86_64\naccel = kvm"), "");
    }

    #[test]
    fn odd_lines_are_passed_over() {
        let test = one("# smp = 9\n  smp =   4  \n\nnonsense\ncolour = red\nextra_params=-m 256M");
        assert_eq!((test.smp, test.memory_mib, test.skip), (4, 256, None));
        assert_eq!(parse("").expect("an empty list"), []);
        assert_eq!(parse("[no_file]\nsmp = 2").expect("a list"), []);
        // As in the suite, a later line of the same key counts.
        assert_eq!(one("smp = 2\r\nsmp = 3\r").smp, 3);
    }

    #[test]
    fn a_bad_line_is_named_with_its_number() {
        for (line, why) in [
            ("smp = many", "not a number of processors"),
            ("smp = 0", "not a number of processors"),
            ("smp = 256", "not a number of processors"),
            ("timeout = soon", "not a number of seconds"),
            ("timeout = 9ss", "not a number of seconds"),
            ("timeout = 0", "not a number of seconds"),
            ("timeout = 18446744073709551615", "a day at most"),
            ("qemu_params = -m 0", "-m 0 is not a size"),
            ("qemu_params = -m 99999999999999999999g", "is not a size"),
            ("test_args = 'a", "no ' ends it"),
            ("qemu_params = \"\"\"a", "no \"\"\" ends it"),
            ("check = /proc", "is not PATH=VALUE"),
        ] {
            let error = parse(&format!("[a]\nfile = a.flat\n{line}")).expect_err(line);
            let text = format!("{error:#}");
            assert!(text.starts_with(&format!("line 3: {line}: ")), "{text}");
            assert!(text.contains(why) && !text.contains('\n'), "{text}");
        }
    }
}
