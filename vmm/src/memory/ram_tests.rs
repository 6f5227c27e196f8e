use super::*;

const MIB: u64 = 1 << 20;

fn ram(size_bytes: u64) -> Result<GuestRam, Error> {
    GuestRam::new(&MemoryConfig::of(size_bytes))
}

#[test]
fn small_memory_is_one_region_from_address_zero() {
    let ram = ram(64 * MIB).unwrap();
    let regions: Vec<_> = ram.memory().iter().collect();
    assert_eq!(regions.len(), 1);
    assert_eq!(regions[0].start_addr(), GuestAddress(0));
    assert_eq!((ram.low_len(), ram.high_len()), (64 * MIB, 0));
}

#[test]
fn big_memory_lies_on_both_sides_of_the_hole_in_one_file() {
    let ram = ram(5 << 30).unwrap();
    let regions: Vec<_> = ram.memory().iter().collect();
    assert_eq!(regions.len(), 2);
    assert_eq!(regions[1].start_addr(), GuestAddress(1 << 32));
    assert_eq!(regions[1].len(), 2 << 30);
    let file = regions[1].file_offset().unwrap();
    assert_eq!(file.start(), 3 << 30);

    // A byte written through the mapping is in the file where a backend will look for it.
    ram.memory()
        .write_obj(0x5au8, GuestAddress((1 << 32) + 7))
        .unwrap();
    let mut byte = [0];
    std::os::unix::fs::FileExt::read_exact_at(file.file(), &mut byte, (3 << 30) + 7).unwrap();
    assert_eq!(byte, [0x5a]);
}

#[test]
fn the_file_can_neither_shrink_nor_grow() {
    let ram = ram(2 * MIB).unwrap();
    let region = ram.memory().iter().next().unwrap();
    let file = region.file_offset().unwrap().file();
    assert!(file.set_len(MIB).is_err());
    assert!(file.set_len(4 * MIB).is_err());
}

#[test]
fn zeroed_bytes_read_as_zero_and_their_neighbours_stay() {
    let ram = ram(2 * MIB).unwrap();
    let (start, end) = (0x1003, 0x3005);
    ram.memory()
        .write_slice(&[0xff; 0x4000], GuestAddress(0x1000))
        .unwrap();
    ram.zero(start, end - start).unwrap();
    let mut bytes = [0; 0x4000];
    ram.memory()
        .read_slice(&mut bytes, GuestAddress(0x1000))
        .unwrap();
    for (i, byte) in (0x1000..).zip(bytes) {
        let zeroed = (start..end).contains(&i);
        assert_eq!(byte, if zeroed { 0 } else { 0xff }, "{i:#x}");
    }
}

#[test]
fn an_unmapped_page_keeps_its_bytes() {
    let ram = ram(2 * MIB).unwrap();
    let at = GuestAddress(0x5000);
    ram.memory().write_slice(&[0x5a; 0x1000], at).unwrap();
    ram.unmap_page(0x5123).unwrap();
    let mut bytes = [0; 0x1000];
    ram.memory().read_slice(&mut bytes, at).unwrap();
    assert_eq!(bytes, [0x5a; 0x1000]);
    ram.unmap_page(2 * MIB).expect("no RAM, nothing to do");
    ram.unmap_page(u64::MAX).expect("no RAM, nothing to do");
}

#[test]
fn ranges_outside_ram_are_not_contained() {
    let ram = ram(5 << 30).unwrap();
    assert!(ram.contains(0, 3 << 30));
    assert!(ram.contains(1 << 32, 2 << 30));
    for (gpa, len) in [
        (0, (3 << 30) + 1),
        (3 << 30, 1),
        ((1 << 32) + 1, 2 << 30),
        (u64::MAX, 2),
    ] {
        assert!(!ram.contains(gpa, len), "{gpa:#x}+{len:#x}");
        assert!(ram.zero(gpa, len).is_err());
    }
}

#[test]
fn sizes_that_no_host_can_give_are_refused_in_one_line() {
    for size in [0, MIB, 3 * MIB + 1] {
        assert!(matches!(ram(size), Err(Error::Size(s)) if s == size));
    }
    let error = ram(1 << 56).unwrap_err().to_string();
    assert!(error.contains("68719476736 MiB"), "{error}");
    assert!(!error.contains('\n'));
}

/// Skipped where the host has reserved no huge pages.
#[test]
fn huge_pages_are_guest_memory_like_any_other() {
    let ram = match GuestRam::new(&MemoryConfig {
        huge_pages: Some(HugePages::Mib2),
        ..MemoryConfig::of(4 * MIB)
    }) {
        Ok(ram) => ram,
        Err(error) => return eprintln!("skipped: {error}"),
    };
    let at = GuestAddress(2 * MIB - 1);
    ram.memory().write_slice(&[0xff; 4], at).unwrap();
    ram.zero(2 * MIB, 2).unwrap();
    let mut bytes = [0; 4];
    ram.memory().read_slice(&mut bytes, at).unwrap();
    assert_eq!(bytes, [0xff, 0, 0, 0xff]);
}

#[test]
fn missing_huge_pages_say_how_to_reserve_them() {
    let error = GuestRam::new(&MemoryConfig {
        huge_pages: Some(HugePages::Mib2),
        ..MemoryConfig::of(1 << 42)
    })
    .unwrap_err()
    .to_string();
    assert!(error.contains("vm.nr_hugepages=2097152"), "{error}");
}

fn made(mode: Mode, config: MemoryConfig) -> GuestRam {
    GuestRam::with_mode(&config, mode).unwrap()
}

fn mergeable(size_bytes: u64, mergeable: Mergeable) -> MemoryConfig {
    MemoryConfig {
        mergeable,
        ..MemoryConfig::of(size_bytes)
    }
}

#[test]
fn a_window_is_all_that_a_file_stands_for() {
    let len = 128 * MIB;
    let ram = made(
        Mode::Window { len },
        mergeable(512 * MIB, Mergeable::Eligible),
    );
    let ranges: Vec<_> = ram.ranges().collect();
    let places: Vec<_> = ranges.iter().map(|r| (r.gpa, r.len, r.kind)).collect();
    let high = (1 << 32, 384 * MIB, Kind::Private);
    assert_eq!(places, [(0, len, Kind::Shared), high]);
    assert_eq!(ram.mergeable_ranges().collect::<Vec<_>>(), ranges[1..]);
    let window = ram.memory().iter().next().unwrap();
    let file = window.file_offset().unwrap().file();
    assert_eq!(file.metadata().unwrap().len(), len);
    assert!(ram.contains(len - 8, 8) && !ram.contains(len - 8, 16));
    assert!(!ram.contains(len, 8) && ram.contains(1 << 32, 384 * MIB));
}

#[test]
fn discarded_pages_are_zeros_whatever_they_were_made_of() {
    for mode in [Mode::Shared, Mode::Private] {
        let ram = made(mode, MemoryConfig::of(4 * MIB));
        let at = GuestAddress(0x1000);
        ram.memory().write_slice(&[0xff; 0x4000], at).unwrap();
        // Two whole pages, and a part of one on each side, which stays.
        assert_eq!(ram.discard(0x1800, 0x3000).unwrap(), 0x2000, "{mode:?}");
        let mut bytes = [0; 0x4000];
        ram.memory().read_slice(&mut bytes, at).unwrap();
        for (i, byte) in (0x1000..).zip(bytes) {
            let gone = (0x2000..0x4000).contains(&i);
            assert_eq!(byte, if gone { 0 } else { 0xff }, "{mode:?} {i:#x}");
        }
        assert_eq!(ram.discard(0x1800, 0x900).unwrap(), 0);
        let outside = ram.discard(4 * MIB - 0x1000, 0x2000);
        assert!(matches!(outside, Err(Error::NotEligible { .. })));
    }
}

#[test]
fn private_memory_is_zeroed_to_the_byte_too() {
    let ram = made(Mode::Private, MemoryConfig::of(2 * MIB));
    for (start, end) in [
        (0x1003, 0x3005),
        (0x1010, 0x1020),
        (0x1000, 0x2000),
        (0x1fff, 0x2001),
    ] {
        let at = GuestAddress(0x1000);
        ram.memory().write_slice(&[0xff; 0x3000], at).unwrap();
        ram.zero(start, end - start).unwrap();
        let mut bytes = [0; 0x3000];
        ram.memory().read_slice(&mut bytes, at).unwrap();
        for (i, byte) in (0x1000..).zip(bytes) {
            let expected = if (start..end).contains(&i) { 0 } else { 0xff };
            assert_eq!(byte, expected, "{start:#x}-{end:#x}: {i:#x}");
        }
    }
}

#[test]
fn prefaulted_memory_stays_there_when_it_is_zeroed() {
    use std::os::unix::fs::FileExt as _;
    let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
    for mode in [Mode::Private, Mode::Shared] {
        let config = MemoryConfig {
            prefault: true,
            ..MemoryConfig::of(2 * MIB)
        };
        let ram = made(mode, config);
        ram.zero(0x1800, 0x8000).unwrap();
        let first = ram.ranges().next().unwrap().host / 4096;
        let absent = (0..2 * MIB / 4096).filter(|page| {
            let mut entry = [0; 8];
            pagemap
                .read_exact_at(&mut entry, (first + page) * 8)
                .unwrap();
            u64::from_le_bytes(entry) >> 63 == 0
        });
        assert_eq!(absent.count(), 0, "{mode:?}");
    }
}

#[test]
fn a_private_page_is_never_unmapped_with_what_is_in_it() {
    let ram = made(Mode::Private, MemoryConfig::of(2 * MIB));
    let at = GuestAddress(0x5000);
    ram.memory().write_obj(0x5a5a_u16, at).unwrap();
    ram.unmap_page(at.raw_value()).unwrap();
    assert_eq!(ram.memory().read_obj::<u16>(at).unwrap(), 0x5a5a);
}

#[test]
fn only_eligible_memory_takes_advice_on_merging() {
    let whole = |ram: &GuestRam| ram.advise(0, 2 * MIB, Advice::Mergeable);
    for (mode, wanted) in [
        (Mode::Private, Mergeable::Off),
        (Mode::Shared, Mergeable::Eligible),
    ] {
        let ram = made(mode, mergeable(2 * MIB, wanted));
        assert_eq!(ram.mergeable_ranges().count(), 0);
        assert!(matches!(whole(&ram), Err(Error::NotEligible { .. })));
        ram.advise(0, 2 * MIB, Advice::NoThp).unwrap();
    }
    let ram = made(Mode::Private, mergeable(2 * MIB, Mergeable::Eligible));
    whole(&ram).unwrap();
    for (gpa, len) in [(0x800, 0x1000), (0, 0x800), (0, 4 * MIB), (0, 0)] {
        let advised = ram.advise(gpa, len, Advice::Mergeable);
        assert!(
            matches!(advised, Err(Error::NotEligible { .. })),
            "{gpa:#x}"
        );
    }
}
