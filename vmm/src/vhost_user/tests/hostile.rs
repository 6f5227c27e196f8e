//! Backends that lie, send junk and shrink their files: what they cannot do to the rest.

use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::super::backend_requests::WINDOW;
use super::*;

/// What a backend says that it should not: before a reply, or of its own accord.
fn hostile(after: u32, noise: Vec<u8>) -> Script {
    Script {
        noise: Some((after, noise)),
        ..GOOD
    }
}

fn message(code: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in [code, flags, payload.len() as u32] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(payload);
    bytes
}

#[test]
fn junk_unsolicited_and_reordered_replies_end_a_connection_and_nothing_else() {
    let junk: Vec<u8> = (0..4096_u32).map(|at| (at * 193) as u8).collect();
    let noises = [
        junk,
        // A reply to what was not asked, one that says it is longer than anything, an early one of another request.
        message(GET_VRING_BASE, 5, &[0; 8]),
        message(GET_FEATURES, 5, &[0xff; 64]),
        [
            &message(GET_QUEUE_NUM, 5, &[])[..8],
            &u32::MAX.to_le_bytes(),
        ]
        .concat(),
        message(GET_CONFIG, 1, &[0xff; 12]),
    ];
    for after in [SET_OWNER, GET_FEATURES, SET_MEM_TABLE, SET_VRING_ENABLE] {
        for noise in &noises {
            let mut bench = bench();
            let scripts = [hostile(after, noise.clone()), GOOD];
            let backend = Backend::listen(&bench.path, &scripts);
            bench.live();
            bench.activate();
            until("the noise", || backend.seen.payload(after).is_some());
            until("the next connection", || {
                // Noise that does no harm ends nothing: then the backend does.
                if bench.frontends.sessions()[0].state == SessionState::Live {
                    backend.hang_up();
                }
                order(&backend.seen, &[SET_OWNER]).len() >= 2
            });
            wait_started(&backend);
            bench.reset();
        }
    }
}

#[test]
fn a_configuration_of_the_wrong_size_is_not_taken() {
    for (offset, size) in [
        (0, 0_u32),
        (0, u32::MAX),
        (u32::MAX, 60),
        (60, 60),
        (0, 59),
        (0, 4096),
    ] {
        let mut bench = bench();
        let mut payload = Vec::new();
        for word in [offset, size, 0] {
            payload.extend(word.to_le_bytes());
        }
        payload.extend(vec![0xee; size.min(256) as usize]);
        let lying = Script {
            config: Some(payload),
            ..GOOD
        };
        let _backend = Backend::listen(&bench.path, &[lying, GOOD]);
        assert!(bench.frontends.wait_settled(PATIENCE));
        bench.live();
        let mut capacity = [0; 8];
        bench.device.read_config(0, &mut capacity);
        assert_eq!(capacity, [0; 8], "offset {offset} size {size}");
        bench.reset();
    }
}

#[test]
fn a_region_that_shrinks_or_has_wild_sizes_raises_nothing_here() {
    for size in [0_u64, 1, 4096, u64::MAX, u64::MAX - 4095] {
        let mut bench = bench();
        let lying = Script {
            region: size,
            ..tracking()
        };
        let first = Backend::listen(&bench.path, &[lying, tracking()]);
        bench.live();
        let [kick, _] = bench.activate();
        wait_started(&first);
        if let Some(region) = &*first.seen.region.lock().unwrap() {
            // What a mapping of it would now end the process by.
            region.set_len(0).unwrap();
        }
        drop(first);
        let second = Backend::listen(&bench.path, &[tracking()]);
        wait(&kick, "kick with the next backend");
        wait_started(&second);
        bench.reset();
    }
}

/// Writes a message again and again, never waiting, until told to stop or the other end is gone; counts how
/// often there was no room.
fn flood(mut channel: UnixStream, message: &[u8], full: &AtomicUsize, stop: &AtomicBool) {
    channel.set_nonblocking(true).unwrap();
    let bytes = message.repeat(100);
    let mut at = 0;
    while !stop.load(Ordering::SeqCst) {
        match channel.write(&bytes[at..]) {
            Ok(count) => at = (at + count) % bytes.len(),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                full.fetch_add(1, Ordering::SeqCst);
                thread::yield_now();
            }
            Err(_) => return,
        }
    }
}

#[test]
fn a_flood_of_requests_is_taken_in_small_doses_and_the_device_works() {
    let change = message(2, 1, &[]);
    let unknown = message(77, 1, &[0x33; 300]);
    for noise in [change, unknown] {
        let mut bench = patient_bench(PATIENCE);
        let backend = Backend::listen(&bench.path, &[GOOD]);
        bench.live();
        let channel = UnixStream::from(OwnedFd::from(backend.seen.file(SET_BACKEND_REQ_FD)));
        let (full, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
        let begin = Instant::now();
        thread::scope(|scope| {
            scope.spawn(|| flood(channel, &noise, &full, &stop));
            until("the channel is full", || full.load(Ordering::SeqCst) > 0);
            let mut round = 0;
            while begin.elapsed() < 5 * WINDOW {
                round += 1;
                bench.activate();
                until("the ring runs", || {
                    order(&backend.seen, &[SET_VRING_KICK]).len() == round
                });
                bench.reset();
                // And there is room again and again.
                let seen = full.load(Ordering::SeqCst);
                until("more of it", || full.load(Ordering::SeqCst) > seen);
            }
            stop.store(true, Ordering::SeqCst);
        });
        let looks = order(&backend.seen, &[GET_CONFIG]).len();
        let windows = begin.elapsed().as_millis() / WINDOW.as_millis() + 2;
        assert!(looks as u128 <= 16 * windows, "{looks} in {windows}");
        assert_eq!(
            order(&backend.seen, &[SET_OWNER]).len(),
            1,
            "one connection"
        );
    }
}

/// The driver of a guest may change a queue's vector as often as it likes; the backend is told when it is back.
#[test]
fn vectors_that_change_while_the_backend_is_away_take_no_memory() {
    let mut bench = bench();
    let backend = Backend::listen(&bench.path, &[GOOD]);
    bench.live();
    bench.activate();
    wait_started(&backend);
    drop(backend);
    until("lost", || {
        bench.frontends.sessions()[0].state != SessionState::Live
    });
    for _ in 0..1000 {
        bench.device.set_call(0, eventfd());
    }
    assert_eq!(bench.frontends.sessions[0].state().new_calls.len(), 1);
}

fn wait_started(backend: &Backend) {
    until("started", || {
        backend.seen.payload(SET_VRING_ENABLE).is_some()
    });
}
