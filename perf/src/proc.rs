//! What /proc tells about a process.
#![forbid(unsafe_code)]

use std::fs;
use std::io::{Error, Result};
use std::time::Duration;

use crate::sys;

/// What /proc/stat counts in, on every architecture (USER_HZ).
const TICKS_PER_SECOND: u64 = 100;

/// CPU time of io_uring's kernel workers, which are threads of the process that submits. Those that
/// have ended (after five idle seconds) are no longer counted.
pub fn workers_cpu(process: &str) -> Result<Duration> {
    let mut sum = Duration::ZERO;
    for entry in fs::read_dir(format!("/proc/{process}/task"))? {
        let task = entry?.path();
        // A thread may end while we look.
        let Ok(name) = fs::read_to_string(task.join("comm")) else {
            continue;
        };
        if !name.starts_with("iou-wrk") {
            continue;
        }
        if let Ok(times) = fs::read_to_string(task.join("schedstat")) {
            sum += on_cpu(&times)?;
        }
    }
    Ok(sum)
}

/// First field of schedstat: nanoseconds on a CPU.
fn on_cpu(schedstat: &str) -> Result<Duration> {
    let field = schedstat.split_whitespace().next().unwrap_or_default();
    field
        .parse()
        .map(Duration::from_nanos)
        .map_err(|_| Error::other(format!("not a schedstat: {schedstat}")))
}

/// When a process began, in ticks since the machine booted: with its number it names it for ever. An error where
/// it is gone, or only its exit code is left.
pub fn start_time(pid: u32) -> Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // Behind the name in brackets, which may have anything in it: field 3, the state, is the first.
    let rest = stat.rsplit(')').next().unwrap_or_default();
    let mut fields = rest.split_whitespace();
    if fields.next() == Some("Z") {
        return Err(Error::other("it has ended"));
    }
    let start = fields.nth(18).and_then(|field| field.parse().ok());
    start.ok_or_else(|| Error::other(format!("not a stat: {stat}")))
}

/// CPU time of the calling thread and of all kernel workers of this process.
pub fn thread_and_workers_cpu() -> Result<Duration> {
    Ok(sys::thread_cpu()? + workers_cpu("self")?)
}

/// Time in which `cpus` have had nothing to do since the machine booted, all together.
pub fn idle_of(cpus: &[usize]) -> Result<Duration> {
    idle_in(&fs::read_to_string("/proc/stat")?, cpus)
}

/// The same from the text: fields `idle` and `iowait` of the lines `cpuN`.
fn idle_in(stat: &str, cpus: &[usize]) -> Result<Duration> {
    let mut ticks = 0;
    for cpu in cpus {
        let line = stat
            .lines()
            .find_map(|line| line.strip_prefix(&format!("cpu{cpu} ")));
        let fields = line.into_iter().flat_map(str::split_whitespace);
        let idle: Vec<u64> = fields.skip(3).take(2).flat_map(str::parse).collect();
        let [idle, waiting] = idle[..] else {
            return Err(Error::other(format!(
                "/proc/stat says nothing of CPU {cpu}"
            )));
        };
        ticks += idle + waiting;
    }
    Ok(Duration::from_millis(ticks * 1000 / TICKS_PER_SECOND))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_time_is_that_of_the_cpus_asked_for() {
        let stat = "cpu  9 9 9 9 9 9\ncpu0 1 2 3 100 20 5\ncpu1 1 2 3 400 1 5\ncpu10 0 0 0 7 7 7\n";
        assert_eq!(idle_in(stat, &[0, 1]).unwrap(), Duration::from_millis(5210));
        assert_eq!(idle_in(stat, &[10]).unwrap(), Duration::from_millis(140));
        assert!(idle_in(stat, &[2]).is_err() && idle_in("cpu0 1 2", &[0]).is_err());
    }

    #[test]
    fn a_process_is_told_from_its_number_by_its_start() {
        let start = start_time(std::process::id()).unwrap();
        assert!(start > 0 && start == start_time(std::process::id()).unwrap());
        assert!(start_time(u32::MAX / 2).is_err());
    }

    #[test]
    fn schedstat_is_read_and_nonsense_refused() {
        assert_eq!(on_cpu("1500 3 4\n").unwrap(), Duration::from_nanos(1500));
        assert!(on_cpu("").is_err() && on_cpu("x 1").is_err());
    }

    #[test]
    fn this_process_has_no_kernel_workers_and_some_cpu_time() {
        assert_eq!(workers_cpu("self").unwrap(), Duration::ZERO);
        assert!(thread_and_workers_cpu().unwrap() > Duration::ZERO);
    }
}
