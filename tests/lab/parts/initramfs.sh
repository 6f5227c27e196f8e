# shellcheck shell=bash
# The initramfs of every guest, and of the L1: busybox, a few modules, guest/init.
# Sourced by tests/lab/assets.

# The modules that guest/init can load, by name; what they depend on comes along.
GUEST_MODULES=(virtio_blk virtio_net virtio_rng virtio_balloon evdev button)

# Prints paths below the modules directory $1 for the named modules in the order to load them.
module_paths() {
    local tree=$1 name paths
    shift
    for name in "$@"; do
        paths=$(grep -E "/${name//[-_]/[-_]}\.ko[^:]*:" "$tree/modules.dep") || die "no module $name in $tree"
        # path: dependencies, each after what it needs itself reads from right to left
        printf '%s\n' "$paths" | awk '{ sub(/:/, "", $1); for (i = NF; i >= 1; i--) print $i }'
    done | awk '!seen[$0]++'
}

# pack_initramfs TREE FILE MODULE...: FILE boots to the agent with these modules of the modules directory TREE.
pack_initramfs() {
    local root=$WORK/initramfs tree=$1 file=$2 path name
    shift 2
    mkdir -p "$root"/{bin,dev,proc,sys,tmp,etc/acpi/PWRF,modules,mnt,newroot,root}
    cp "$(dpkg -L busybox-static | grep '/bin/busybox$')" "$root/bin/busybox"
    install -m 755 "$LAB_SRC/guest/init" "$LAB_SRC/guest/agent" "$root/"
    # acpid runs every file of this folder with the button's event.
    install -m 755 "$LAB_SRC/guest/power-button" "$root/etc/acpi/PWRF/00000080"
    module_paths "$tree" "$@" | while read -r path; do
        name=$(basename "$path" .xz)
        case $path in
            *.xz) xz -dc "$tree/$path" >"$root/modules/$name" ;;
            *) cp "$tree/$path" "$root/modules/$name" ;;
        esac
        printf '%s\n' "$name" >>"$root/modules/order"
    done
    (cd "$root" && find . | sort | cpio --quiet -o -H newc -R 0:0) >"$file"
    rm -rf "$root"
}

build_initramfs() {
    pack_initramfs "$ASSETS/modules/$(cat "$ASSETS/kernel-version")" "$WORK/guest-initramfs.cpio" "${GUEST_MODULES[@]}"
}
