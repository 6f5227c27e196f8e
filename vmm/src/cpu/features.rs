//! CPU features by name: the bits of `--cpus features=+x,-y`, and what they change in a guest's CPUID.
//!
//! A name is QEMU's or Linux's (`/proc/cpuinfo`), in either spelling of its hyphens. What was asked for is
//! kept as two bits for each feature, so that a configuration stays plain data; it is carried out on the
//! leaves that the VMM offers anyway ([`super::cpuid`]), after everything else: who asks for a feature that
//! is left out by default gets it, where KVM has it.
//!
//! Intel SDM volume 2, CPUID; AMD64 APM volume 3, appendix E; KVM cpuid.rst (leaf 0x4000_0001).

#![forbid(unsafe_code)]

use kvm_bindings::kvm_cpuid_entry2;

use crate::config::keys::hint;

/// A register of a CPUID entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// A register whose bits are features.
struct Word {
    function: u32,
    index: u32,
    register: Register,
    /// Name and bit; several names of one bit are separated by '|', the first is the one in messages.
    bits: &'static [(&'static str, u32)],
}

const fn word(
    function: u32,
    index: u32,
    register: Register,
    bits: &'static [(&'static str, u32)],
) -> Word {
    Word {
        function,
        index,
        register,
        bits,
    }
}

/// How many words there are.
const COUNT: usize = 13;

#[rustfmt::skip]
const WORDS: [Word; COUNT] = [
    word(1, 0, Register::Ecx, &[
        ("pni|sse3", 0), ("pclmulqdq", 1), ("dtes64", 2), ("monitor", 3), ("ds-cpl", 4), ("vmx", 5), ("smx", 6),
        ("est", 7), ("tm2", 8), ("ssse3", 9), ("fma", 12), ("cx16", 13), ("xtpr", 14), ("pdcm", 15), ("pcid", 17),
        ("dca", 18), ("sse4.1|sse4-1", 19), ("sse4.2|sse4-2", 20), ("x2apic", 21), ("movbe", 22), ("popcnt", 23),
        ("tsc-deadline|tsc-deadline-timer", 24), ("aes", 25), ("xsave", 26), ("avx", 28), ("f16c", 29),
        ("rdrand", 30), ("hypervisor", 31),
    ]),
    word(1, 0, Register::Edx, &[
        ("fpu", 0), ("vme", 1), ("de", 2), ("pse", 3), ("tsc", 4), ("msr", 5), ("pae", 6), ("mce", 7), ("cx8", 8),
        ("apic", 9), ("sep", 11), ("mtrr", 12), ("pge", 13), ("mca", 14), ("cmov", 15), ("pat", 16), ("pse36", 17),
        ("pn", 18), ("clflush", 19), ("ds|dts", 21), ("acpi", 22), ("mmx", 23), ("fxsr", 24), ("sse", 25),
        ("sse2", 26), ("ss", 27), ("ht", 28), ("tm", 29), ("pbe", 31),
    ]),
    word(7, 0, Register::Ebx, &[
        ("fsgsbase", 0), ("tsc-adjust", 1), ("sgx", 2), ("bmi1", 3), ("hle", 4), ("avx2", 5), ("smep", 7),
        ("bmi2", 8), ("erms", 9), ("invpcid", 10), ("rtm", 11), ("mpx", 14), ("avx512f", 16), ("avx512dq", 17),
        ("rdseed", 18), ("adx", 19), ("smap", 20), ("avx512ifma", 21), ("clflushopt", 23), ("clwb", 24),
        ("intel-pt", 25), ("avx512pf", 26), ("avx512er", 27), ("avx512cd", 28), ("sha-ni", 29), ("avx512bw", 30),
        ("avx512vl", 31),
    ]),
    word(7, 0, Register::Ecx, &[
        ("avx512vbmi", 1), ("umip", 2), ("pku", 3), ("ospke", 4), ("waitpkg", 5), ("avx512vbmi2|avx512-vbmi2", 6),
        ("shstk|user-shstk", 7), ("gfni", 8), ("vaes", 9), ("vpclmulqdq", 10), ("avx512vnni|avx512-vnni", 11),
        ("avx512bitalg|avx512-bitalg", 12), ("avx512-vpopcntdq", 14), ("la57", 16), ("rdpid", 22),
        ("bus-lock-detect", 24), ("cldemote", 25), ("movdiri", 27), ("movdir64b", 28), ("pks", 31),
    ]),
    word(7, 0, Register::Edx, &[
        ("avx512-4vnniw", 2), ("avx512-4fmaps", 3), ("fsrm", 4), ("avx512-vp2intersect", 8), ("md-clear", 10),
        ("serialize", 14), ("tsx-ldtrk", 16), ("arch-lbr", 19), ("ibt", 20), ("amx-bf16", 22), ("avx512-fp16", 23),
        ("amx-tile", 24), ("amx-int8", 25), ("spec-ctrl", 26), ("stibp|intel-stibp", 27), ("flush-l1d", 28),
        ("arch-capabilities", 29), ("core-capability", 30), ("ssbd", 31),
    ]),
    word(7, 1, Register::Eax, &[
        ("avx-vnni", 4), ("avx512-bf16", 5), ("cmpccxadd", 7), ("fzrm", 10), ("fsrs", 11), ("fsrc", 12),
        ("amx-fp16", 21), ("avx-ifma", 23), ("lam", 26),
    ]),
    word(0xd, 1, Register::Eax, &[
        ("xsaveopt", 0), ("xsavec", 1), ("xgetbv1", 2), ("xsaves", 3), ("xfd", 4),
    ]),
    word(0x4000_0001, 0, Register::Eax, &[
        ("kvmclock", 3), ("kvm-nopiodelay", 1), ("kvm-asyncpf", 4), ("kvm-steal-time", 5), ("kvm-pv-eoi", 6),
        ("kvm-pv-unhalt", 7), ("kvm-pv-tlb-flush", 9), ("kvm-asyncpf-vmexit", 10), ("kvm-pv-ipi", 11),
        ("kvm-poll-control", 12), ("kvm-pv-sched-yield", 13), ("kvm-asyncpf-int", 14),
        ("kvm-msi-ext-dest-id", 15), ("kvmclock-stable-bit", 24),
    ]),
    word(0x8000_0001, 0, Register::Ecx, &[
        ("lahf-lm", 0), ("cmp-legacy", 1), ("svm", 2), ("extapic", 3), ("cr8legacy|cr8-legacy", 4),
        ("abm|lzcnt", 5), ("sse4a", 6), ("misalignsse", 7), ("3dnowprefetch", 8), ("osvw", 9), ("ibs", 10),
        ("xop", 11), ("skinit", 12), ("wdt", 13), ("lwp", 15), ("fma4", 16), ("tce", 17), ("tbm", 21),
        ("topoext", 22), ("perfctr-core", 23), ("perfctr-nb", 24),
    ]),
    word(0x8000_0001, 0, Register::Edx, &[
        ("syscall", 11), ("nx", 20), ("mmxext", 22), ("fxsr-opt", 25), ("pdpe1gb", 26), ("rdtscp", 27), ("lm", 29),
        ("3dnowext", 30), ("3dnow", 31),
    ]),
    word(0x8000_0007, 0, Register::Edx, &[("invtsc|nonstop-tsc", 8)]),
    word(0x8000_0008, 0, Register::Ebx, &[
        ("clzero", 0), ("xsaveerptr", 2), ("rdpru", 4), ("wbnoinvd", 9), ("ibpb", 12), ("ibrs", 14),
        ("amd-stibp", 15), ("amd-ssbd", 24), ("virt-ssbd", 25), ("amd-no-ssb", 26), ("amd-psfd", 28),
    ]),
    word(0x8000_0021, 0, Register::Eax, &[
        ("no-nested-data-bp", 0), ("lfence-always-serializing", 2), ("null-sel-clr-base", 6), ("auto-ibrs", 8),
    ]),
];

/// Why a list of features cannot be read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// No such feature.
    #[error("unknown CPU feature '{name}' ({hint})")]
    Unknown {
        /// The name as typed.
        name: String,
        /// The nearest known one.
        hint: String,
    },
    /// Asked for and not wanted.
    #[error("CPU feature '{name}' is given twice")]
    Twice {
        /// The name as typed.
        name: String,
    },
}

/// Features that a guest is to have or not, beyond what it gets anyway.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Features {
    add: [u32; COUNT],
    remove: [u32; COUNT],
}

impl Features {
    /// From names, each with a '+' or '-' before it; without one, '+'.
    pub fn parse<'a>(names: impl IntoIterator<Item = &'a str>) -> Result<Self, Error> {
        let mut features = Self::default();
        for item in names {
            let (set, name) = match item.strip_prefix('-') {
                Some(name) => (&mut features.remove, name),
                None => (&mut features.add, item.strip_prefix('+').unwrap_or(item)),
            };
            let (word, bit) = find(name)?;
            set[word] |= 1 << bit;
            if features.add[word] & features.remove[word] != 0 {
                let name = name.to_owned();
                return Err(Error::Twice { name });
            }
        }
        Ok(features)
    }

    /// Whether the guest is not to have x2APIC mode.
    pub fn removes_x2apic(&self) -> bool {
        find("x2apic").is_ok_and(|(word, bit)| self.remove[word] >> bit & 1 != 0)
    }

    /// The list that these are read from, in the order of the CPUID leaves.
    pub fn names(&self) -> Vec<String> {
        let signed = |sign, set: &[u32; COUNT]| -> Vec<String> {
            named(set).map(|name| format!("{sign}{name}")).collect()
        };
        [signed('+', &self.add), signed('-', &self.remove)].concat()
    }

    /// Changes the leaves of a guest. `supported` are KVM's. Says which feature it lacks that was asked for;
    /// some are offered besides KVM's list (`x2apic`), so what `entries` has already is supported.
    pub fn apply(
        &self,
        entries: &mut [kvm_cpuid_entry2],
        supported: &[kvm_cpuid_entry2],
    ) -> Result<(), &'static str> {
        for (index, word) in WORDS.iter().enumerate() {
            let is_here =
                |e: &kvm_cpuid_entry2| e.function == word.function && e.index == word.index;
            let value = |list: &[kvm_cpuid_entry2]| {
                list.iter()
                    .find(|e| is_here(e))
                    .map_or(0, |e| *register(&mut e.clone(), word.register))
            };
            let lacking = self.add[index] & !value(supported) & !value(entries);
            if lacking != 0 {
                let mut only = [0; COUNT];
                only[index] = lacking;
                return Err(named(&only).next().unwrap_or("unknown"));
            }
            if let Some(entry) = entries.iter_mut().find(|e| is_here(e)) {
                let bits = register(entry, word.register);
                *bits = (*bits | self.add[index]) & !self.remove[index];
            }
        }
        Ok(())
    }
}

fn register(entry: &mut kvm_cpuid_entry2, register: Register) -> &mut u32 {
    match register {
        Register::Eax => &mut entry.eax,
        Register::Ebx => &mut entry.ebx,
        Register::Ecx => &mut entry.ecx,
        Register::Edx => &mut entry.edx,
    }
}

/// First name of each feature in a set.
fn named(set: &[u32; COUNT]) -> impl Iterator<Item = &'static str> {
    let set = *set;
    WORDS.iter().zip(set).flat_map(|(word, set)| {
        let is_set = move |bit: &u32| set >> bit & 1 != 0;
        let bits = word.bits.iter().filter(move |(_, bit)| is_set(bit));
        bits.map(|(names, _)| names.split('|').next().unwrap_or(names))
    })
}

/// Word and bit of a feature.
fn find(typed: &str) -> Result<(usize, u32), Error> {
    let name = typed.to_ascii_lowercase().replace('_', "-");
    for (index, word) in WORDS.iter().enumerate() {
        for (names, bit) in word.bits {
            if names.split('|').any(|known| known == name) {
                return Ok((index, *bit));
            }
        }
    }
    let known: Vec<&str> = WORDS
        .iter()
        .flat_map(|word| word.bits)
        .flat_map(|(names, _)| names.split('|'))
        .collect();
    Err(Error::Unknown {
        hint: nearest(&name, &known),
        name: typed.to_owned(),
    })
}

/// The nearest name; where none is near, where the names stand.
fn nearest(name: &str, known: &[&str]) -> String {
    let hint = hint(name, known);
    if hint.starts_with("nearest") {
        hint
    } else {
        "docs/cpu.md lists them".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    #[test]
    fn no_name_and_no_bit_is_there_twice() {
        let mut names = std::collections::BTreeSet::new();
        for word in &WORDS {
            let mut bits = 0u32;
            for (all, bit) in word.bits {
                assert_eq!(bits >> bit & 1, 0, "{all}");
                bits |= 1 << bit;
                for name in all.split('|') {
                    assert!(names.insert(name), "{name}");
                    assert_eq!(name, name.to_ascii_lowercase().replace('_', "-"));
                }
            }
        }
    }

    #[test]
    fn names_are_read_in_either_spelling_and_written_as_qemu_does() {
        let features = Features::parse(["+tsc_adjust", "SSE4_1", "-x2apic", "-tsc_deadline_timer"]);
        let features = features.unwrap();
        assert!(features.removes_x2apic());
        assert!(
            !Features::parse(["+x2apic", "-avx"])
                .unwrap()
                .removes_x2apic()
        );
        let names = features.names();
        assert_eq!(
            names,
            ["+sse4.1", "+tsc-adjust", "-x2apic", "-tsc-deadline"]
        );
        let again = Features::parse(names.iter().map(String::as_str)).unwrap();
        assert_eq!(again, features);
    }

    #[test]
    fn what_is_wrong_is_said_with_the_nearest_name() {
        let error = |list: &[&'static str]| {
            Features::parse(list.iter().copied())
                .unwrap_err()
                .to_string()
        };
        assert_eq!(
            error(&["+x2apci"]),
            "unknown CPU feature 'x2apci' (nearest: 'x2apic')"
        );
        assert_eq!(
            error(&["+zzzz"]),
            "unknown CPU feature 'zzzz' (docs/cpu.md lists them)"
        );
        assert_eq!(
            error(&[""]),
            "unknown CPU feature '' (docs/cpu.md lists them)"
        );
        assert_eq!(error(&["+aes", "-aes"]), "CPU feature 'aes' is given twice");
    }

    #[test]
    fn bits_are_set_where_kvm_has_them_and_cleared_anywhere() {
        let supported = [
            leaf(1, 0, [0, 0, 1 << 17 | 1 << 5, 0]),
            leaf(7, 0, [0, 1 << 10, 0, 0]),
        ];
        let mut entries = supported;
        entries[0].ecx = 1 << 21;
        let features = Features::parse(["+vmx", "+x2apic", "-invpcid", "+pcid"]).unwrap();
        features.apply(&mut entries, &supported).unwrap();
        assert_eq!(entries[0].ecx, 1 << 5 | 1 << 17 | 1 << 21);
        assert_eq!(entries[1].ebx, 0);
        for (name, lacking) in [("+aes", "aes"), ("+la57", "la57"), ("+rdpru", "rdpru")] {
            let features = Features::parse([name]).unwrap();
            assert_eq!(features.apply(&mut entries, &supported), Err(lacking));
        }
        let features = Features::parse(["-rdpru"]).unwrap();
        features
            .apply(&mut entries, &supported)
            .expect("taking away what is not there");
    }
}
