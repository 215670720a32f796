//! Guards the suites of `urus bench`: that each test of them runs and is told by name, what programs read of the results, and that what
//! the bench made can be removed again without anything else.

mod common;

use common::Scratch;

const SMALL: &str = "--size 16M --seconds 0.06 --pairs 3";

#[test]
fn the_proposal_suite_runs_all_thirty() {
    let scratch = Scratch::new();
    let ran = scratch.urus(&format!(
        "bench --suite proposal {SMALL} --json --svg charts"
    ));
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_eq!(ran.stderr, "", "no progress bar where there is no terminal");
    let report: serde_json::Value = serde_json::from_str(&ran.stdout).expect("JSON");
    assert_eq!(report["suite"], "proposal");
    assert_eq!(report["size"], 16 << 20);
    assert_eq!(report["left-out"].as_array().map(Vec::len), Some(0));
    let rows = report["rows"].as_array().expect("a list");
    assert_eq!(rows.len(), 30);
    for row in rows {
        let number = |path: &str| row.pointer(path).and_then(serde_json::Value::as_f64);
        for path in [
            "/iops/io_uring",
            "/iops/blocking",
            "/iops-ratio/median",
            "/iops-ratio/min",
            "/iops-ratio/max",
            "/cpu-ratio/median",
            "/latency-microseconds/io_uring/p50",
            "/latency-microseconds/blocking/p99.9",
        ] {
            assert!(number(path).expect("a number") > 0.0, "{path} of {row}");
        }
    }
    let chart = std::fs::read_to_string(scratch.path("charts/ratios.svg")).expect("a chart");
    assert!(chart.starts_with("<svg"), "{chart}");
    for name in ["qcow2_read", "backing_raw_read_warm_4_queues"] {
        assert!(chart.contains(name), "{name} is not in the chart");
    }
    for name in ["zlib", "zstd"] {
        scratch.sh(&format!(
            "qemu-img info urus-bench-images/{name}-16777216.qcow2 | grep -q 'compression type: {name}'
             qemu-img compare -q urus-bench-images/{name}-16777216.qcow2 urus-bench-images/qcow2-16777216.qcow2"
        ));
    }

    scratch.sh("touch urus-bench-images/mine");
    let ran = scratch.urus("bench --clean");
    assert_eq!(ran.code, Some(0), "{ran:?}");
    scratch.sh("test $(ls urus-bench-images) = mine");
}

#[test]
fn tests_that_need_qemu_img_are_left_out_without_it() {
    let scratch = Scratch::new();
    let only = "--only zstd_read,qcow2_random_read_4_queues --clean";
    let mut command = scratch.command(
        common::urus(),
        &format!("bench --suite proposal {SMALL} {only}"),
    );
    let output = command.env("PATH", "").output().expect("urus runs");
    let text = String::from_utf8(output.stdout).expect("text");
    assert!(output.status.success(), "{text}");
    let line = |name: &str| {
        text.lines()
            .find(|line| line.starts_with(name))
            .unwrap_or_else(|| panic!("{name} is not in {text}"))
    };
    assert!(line("zstd_read ").contains("left out: qemu-img"));
    assert!(!line("qcow2_random_read_4_queues ").contains("left out"));
    scratch.sh("test ! -e urus-bench-images");
}

#[test]
fn the_writes_suite_compares_with_qemu() {
    let scratch = Scratch::new();
    let ran = scratch.urus("bench --suite writes --size 16M --pairs 2 --json");
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let report: serde_json::Value = serde_json::from_str(&ran.stdout).expect("JSON");
    assert_eq!(report["writes"], 256);
    let rows = report["rows"].as_array().expect("a list");
    let names: Vec<_> = rows.iter().map(|row| row["name"].as_str()).collect();
    let expected = [
        "allocate",
        "allocate_direct",
        "copy_on_write",
        "copy_on_write_direct",
    ];
    assert_eq!(names, expected.map(Some));
    for row in rows {
        let number = |path: &str| row.pointer(path).and_then(serde_json::Value::as_f64);
        for path in ["/urus-per-second", "/qemu-per-second", "/ratio/median"] {
            assert!(number(path).expect("a number") > 0.0, "{path} of {row}");
        }
    }
    // The last run was urus': an image in order, with what was written.
    scratch.sh("cd urus-bench-images
         qemu-img check -q written-16777216.qcow2
         qemu-io -f qcow2 -c 'read -P 0x77 16711680 4k' written-16777216.qcow2
         ! qemu-io -f qcow2 -c 'read -P 0x77 16715776 4k' written-16777216.qcow2");
    let ran = scratch.urus("bench --clean");
    assert_eq!(ran.code, Some(0), "{ran:?}");
    scratch.sh("test ! -e urus-bench-images");
}

/// All but `open_1t`, whose image has 160 MiB of metadata.
const BARS: &str = "P1,P2,P3,P4,P5,P6,P7,P8,P9,P10,P11,P12,open_16t,P14,P15,P16";

#[test]
fn the_bars_suite_measures_every_bar() {
    let scratch = Scratch::new();
    let ran = scratch.urus(&format!(
        "bench --suite bars {SMALL} --only {BARS} --json --svg charts"
    ));
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_eq!(ran.stderr, "", "no progress bar where there is no terminal");
    let report: serde_json::Value = serde_json::from_str(&ran.stdout).expect("JSON");
    let rows = report["rows"].as_array().expect("a list");
    let mut bars: Vec<_> = rows.iter().filter_map(|row| row["bar"].as_str()).collect();
    bars.dedup();
    let expected: Vec<_> = (1..=16).map(|number| format!("P{number}")).collect();
    assert_eq!(bars, expected);
    // The peers' crates, the virtual machine's client, and a command that is not there yet.
    let elsewhere = ["imago", "qcow2_rs", "vhost_user", "convert"];
    for row in rows {
        let name = row["name"].as_str().expect("a name");
        if elsewhere.iter().any(|part| name.contains(part)) {
            assert_eq!(row["verdict"], "left out", "{row}");
            assert!(row["why"].as_str().is_some_and(|why| !why.is_empty()));
            continue;
        }
        let verdicts = ["met", "missed", "not shown", "told"];
        let verdict = row["verdict"].as_str().expect("a verdict");
        assert!(verdicts.contains(&verdict), "{row}");
        let number = |path: &str| row.pointer(path).and_then(serde_json::Value::as_f64);
        for path in ["/measured/value/median", "/measured/value/low"] {
            assert!(number(path).is_some(), "{path} of {row}");
        }
        let is_counted = row["measured"]["unit"] == "fdatasyncs" || row["measured"]["unit"] == "ms";
        let rate = number("/measured/operations-per-second/subject");
        assert!(is_counted || rate.is_some_and(|rate| rate > 0.0), "{row}");
    }
    let count = |name: &str| {
        let row = rows.iter().find(|row| row["name"] == name).expect(name);
        row.pointer("/measured/value/median")
            .and_then(serde_json::Value::as_f64)
    };
    assert_eq!(count("barriers_new_table"), Some(2.0));
    assert_eq!(count("barriers_new_cluster"), Some(2.0));
    assert_eq!(count("barriers_overwrite"), Some(1.0));
    let chart = std::fs::read_to_string(scratch.path("charts/ratios.svg")).expect("a chart");
    assert!(chart.contains("P1 direct_random_read"), "{chart}");
    assert!(chart.contains("P16 barriers_overwrite"), "{chart}");
    scratch.sh("qemu-img check -q urus-bench-images/overwritten-16777216.qcow2");
    assert_eq!(scratch.urus("bench --clean").code, Some(0));
    scratch.sh("test ! -e urus-bench-images");
}

#[test]
fn bars_without_their_peer_say_so() {
    let scratch = Scratch::new();
    let only = "--only direct_random_read_fio,P7,zlib_window,P12,P16 --clean";
    let mut command = scratch.command(
        common::urus(),
        &format!("bench --suite bars {SMALL} {only}"),
    );
    let output = command.env("PATH", "").output().expect("urus runs");
    let text = String::from_utf8(output.stdout).expect("text");
    assert!(output.status.success(), "{text}");
    let line = |name: &str| {
        let mut lines = text.lines();
        lines
            .find(|line| line.contains(&format!(" {name} ")))
            .unwrap_or_else(|| panic!("{name} is not in {text}"))
    };
    for (name, program) in [
        ("direct_random_read_fio", "fio"),
        ("allocate", "qemu-img"),
        ("zlib_window", "qemu-img"),
        ("nbd_random_read", "qemu-nbd"),
    ] {
        assert!(line(name).contains("left out"), "{text}");
        assert!(line(name).contains("cannot be run"), "{text}");
        assert!(line(name).contains(program), "{text}");
    }
    // What needs nobody is measured.
    assert!(!line("allocate_2_queues").contains("left out"), "{text}");
    assert!(line("barriers_overwrite").contains("met"), "{text}");
    scratch.sh("test ! -e urus-bench-images");
}

#[test]
fn what_does_not_go_together_is_refused() {
    let scratch = Scratch::new();
    for line in [
        "bench",
        "bench a.qcow2 --suite proposal",
        "bench --suite proposal --mode randwrite",
        "bench --suite proposal --only no_such_test",
        "bench --suite writes --only no_such_test",
        "bench --suite bars --only P17",
        "bench --suite bars --size 1M",
        "bench --suite writes --size 1M",
        "bench --suite writes --svg charts",
        "bench a.qcow2 --clean",
    ] {
        assert_eq!(scratch.urus(line).code, Some(2), "{line}");
    }
    scratch.sh("test -z \"$(ls)\"");
}
