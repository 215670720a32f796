//! A guest whose root file system is on the disk.
//!
//! Guards what a data disk does not show: the kernel reads its programs from the image while it writes there, so that the machine
//! that dies amid work cannot start again unless the image is whole. It dies twice; each next start replays the journal, everything that was
//! synced is there, and what is left is in order for e2fsck and qemu-img.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;
use std::time::Duration;

use urus_tests::{Scratch, program};

use super::{Daemon, Guest, SIZE, judged};

/// From the RAM disk to the root file system. Mounting it replays the journal.
const SWITCH: &str = r#"
must mount mount -t ext4 /dev/vda /mnt
say replayed $(dmesg | grep -c 'EXT4-fs (vda): recovery complete')
umount /proc /sys
mount -o move /dev /mnt/dev
exec switch_root /mnt /sbin/init
"#;

/// The first program of the root file system: says what it finds of earlier starts, and writes files, each durable before it says so,
/// until somebody pulls the plug; at its third start it ends in order.
const INIT: &str = r#"#!/bin/sh
export PATH=/bin
mount -t proc proc /proc
say() { echo "URUS $*"; }
boot=$(($(cat /etc/boots)+1))
echo $boot > /etc/boots
sync
say boot $boot $(grep -c '^/dev/vda / ext4 rw' /proc/mounts)
for file in /data/*; do [ -f $file ] && say found ${file#/data/} $(md5sum $file | cut -d' ' -f1); done
say looked
if [ $boot -eq 3 ]; then
  mount -o remount,ro / && say readonly ok || say readonly FAILED
  say end
  poweroff -f
fi
number=$((boot*1000))
while true; do
  number=$((number+1))
  dd if=/dev/urandom of=/data/new bs=16k count=$((number%7+1)) conv=fsync 2>/dev/null
  mv /data/new /data/$number
  sync
  say durable $number $(md5sum /data/$number | cut -d' ' -f1)
  # Programs come from the disk as well, and metadata goes on changing.
  echo 3 > /proc/sys/vm/drop_caches
  mkdir -p /tmp/$number && cp /bin/busybox /tmp/$number/ && rm -r /tmp/$((number-3)) 2>/dev/null
done
"#;

/// The image, with a root file system of busybox and the script.
fn root_image(scratch: &Scratch) -> PathBuf {
    let root = scratch.file("rootfs");
    for directory in ["bin", "sbin", "etc", "data", "tmp", "proc", "dev"] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    let busybox = root.join("bin/busybox");
    fs::copy("/bin/busybox", &busybox).expect("busybox-static");
    for applet in [
        "sh", "mount", "umount", "cat", "grep", "md5sum", "cut", "sync", "dd", "mv", "mkdir", "cp",
        "rm", "poweroff",
    ] {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    let init = root.join("sbin/init");
    fs::write(&init, INIT).unwrap();
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(root.join("etc/boots"), "0\n").unwrap();
    let (raw, image) = (scratch.file("root.raw"), scratch.file("image.qcow2"));
    program("mke2fs")
        .words("-q -F -t ext4 -d")
        .arg(&root)
        .arg(&raw)
        .arg(format!("{}k", SIZE / 1024))
        .ok();
    program("qemu-img")
        .words("convert -f raw -O qcow2")
        .arg(&raw)
        .arg(&image)
        .ok();
    image
}

#[test]
fn a_root_file_system_survives_the_death_of_its_machine() {
    let scratch = Scratch::new();
    let image = root_image(&scratch);
    let daemon = Daemon::start(&scratch, &image, &[]);
    let mut durable = BTreeSet::new();
    for boot in 1..=3 {
        let mut guest = Guest::boot(&scratch, &daemon, SWITCH);
        assert_eq!(guest.says("mount"), "ok");
        // Nothing is to be replayed of a file system that is new.
        let replayed = if boot == 1 { "0" } else { "1" };
        assert_eq!(guest.says("replayed"), replayed, "at start {boot}");
        // The root is the disk, and writable.
        assert_eq!(guest.says("boot"), format!("{boot} 1"));
        guest.says("looked");
        let found: BTreeSet<String> = guest.said("found").into_iter().collect();
        for file in &durable {
            assert!(
                found.contains(file),
                "{file} was durable, and is lost: {found:?}"
            );
        }
        if boot == 3 {
            assert_eq!(guest.says("readonly"), "ok");
            guest.says("end");
            break;
        }
        for _ in 0..10 {
            durable.insert(guest.says("durable"));
        }
        // Amid the next one, and not at the same point each time.
        std::thread::sleep(Duration::from_millis(15 * boot));
        drop(guest);
    }
    let flushes = daemon.operations("flush");
    assert!(flushes >= durable.len() as u64, "{flushes} flushes");
    let log = daemon.stop();
    assert_eq!(Daemon::counter(&log, "failed"), 0, "{log}");
    judged(&scratch, &image);
}
