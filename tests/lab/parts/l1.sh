# shellcheck shell=bash
# l1-root.raw: the L1's root file system, a small Debian of the host's own release, so that what was
# built on the host runs in it. Sourced by tests/lab/assets.

L1_PACKAGES=(iproute2 e2fsprogs qemu-utils ethtool busybox-static iputils-ping procps util-linux kmod
    fdisk strace)

# What no test reads, and would have to be unpacked and copied.
LEAN=(--dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*'
    --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/info/*')

# debian_root DIR PACKAGES(comma separated)
debian_root() {
    # shellcheck disable=SC2016 # mmdebstrap's shell expands $1
    mmdebstrap --quiet --mode=root --variant=minbase --skip=check/qemu --include="$2" "${LEAN[@]}" \
        --aptopt='Acquire::Retries "3"' \
        --setup-hook="printf 'Package: qemu-* linux-*\nPin: release n=$NEWER\nPin-Priority: 900\n' >\"\$1/etc/apt/preferences.d/newer\"" \
        --customize-hook='rm -rf "$1"/var/cache/apt/*.bin "$1"/var/lib/apt/lists/*' \
        "$SUITE" "$1" "$SOURCES" >"$1.log" 2>&1 || { tail -n 30 "$1.log" >&2; die "mmdebstrap failed"; }
}

# ext4_image FILE SIZE DIR LABEL: a sparse image of a whole-disk ext4 that holds DIR.
ext4_image() {
    rm -f "$1"
    truncate -s "$2" "$1"
    mke2fs -q -t ext4 -m 0 -L "$4" -E assume_storage_prezeroed=1,root_owner=0:0 -d "$3" "$1"
}

build_l1() {
    local root=$WORK/l1
    debian_root "$root" "$(IFS=,; printf '%s' "${L1_PACKAGES[*]}")"
    mkdir -p "$root/lib/modules" "$root/lab"
    cp -a "$ASSETS"/modules/* "$root/lib/modules/"
    install -m 755 "$LAB_SRC/l1/first" "$root/sbin/lab-first"
    ext4_image "$WORK/l1-root.raw" 8G "$root" l1-root
    rm -rf "$root" "$root.log"
}
