# shellcheck shell=bash
# demo-disk.raw: a small Debian with systemd, its root file system on the whole disk. Its console on ttyS0
# is the command agent, or a root shell with berth.noagent on the kernel's command line.
# Sourced by tests/lab/assets, after l1.sh.

DEMO_PACKAGES=(systemd-sysv login kmod iproute2 iputils-ping procps busybox-static e2fsprogs)

build_demo-disk() {
    local root=$WORK/demo units=$WORK/demo/etc/systemd/system unit
    debian_root "$root" "$(IFS=,; printf '%s' "${DEMO_PACKAGES[*]}")"
    cp -a "$ASSETS"/modules/* "$root/lib/modules/"
    install -D -m 755 -t "$root/usr/lib/berth" "$LAB_SRC/guest/agent" "$LAB_SRC/demo-disk/network"
    install -D -m 755 "$LAB_SRC/demo-disk/power-button" "$root/etc/acpi/PWRF/00000080"
    for unit in "$LAB_SRC"/demo-disk/*.service; do
        install -m 644 "$unit" "$units/"
        mkdir -p "$units/multi-user.target.wants"
        ln -s "../${unit##*/}" "$units/multi-user.target.wants/"
    done
    # No udev here, so nothing may wait for device units; and nothing on a timer in a short life.
    for unit in serial-getty@ttyS0.service getty@tty1.service getty-static.service e2scrub_reap.service proc-sys-fs-binfmt_misc.automount \
        apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer fstrim.timer dpkg-db-backup.timer; do
        ln -sf /dev/null "$units/$unit"
    done
    printf 'berth-demo\n' >"$root/etc/hostname"
    printf '127.0.0.1 localhost berth-demo\n' >"$root/etc/hosts"
    printf '%032x\n' 0xbe47 >"$root/etc/machine-id"
    mkdir -p "$root/srv/www"
    printf 'hello from a Berth guest\n' >"$root/srv/www/index.html"
    ext4_image "$WORK/demo-disk.raw" 2G "$root" berth-demo
    rm -rf "$root" "$root.log"
}
