//! Guards the suites of `urus bench` that say how cost grows: that each test of them runs, small, and is told by name, and that a bound
//! that does not hold makes the command fail.

mod common;

use common::Scratch;

#[test]
fn the_memory_suite_holds_its_bounds() {
    let scratch = Scratch::new();
    let ran = scratch.urus("bench --suite memory --size 16M --seconds 2 --json");
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let report: serde_json::Value = serde_json::from_str(&ran.stdout).expect("JSON");
    let rows = report["rows"].as_array().expect("a list");
    let names: Vec<_> = rows.iter().map(|row| row["name"].as_str()).collect();
    assert_eq!(names, ["mapped", "huge", "uptime"].map(Some));
    for row in rows {
        let number = |name: &str| row[name].as_f64().expect("a number");
        assert!(number("requests") > 100.0, "{row}");
        assert!(number("queues-made") >= 2.0, "{row}");
        assert!(number("most") > 0.0 && number("most") <= number("bound"));
        assert_eq!(row["holds"], true, "{row}");
    }
    scratch.sh("for image in urus-bench-images/*.qcow2; do qemu-img check -q $image; done");
    let ran = scratch.urus("bench --clean");
    assert_eq!(ran.code, Some(0), "{ran:?}");
    scratch.sh("test ! -e urus-bench-images");
}

#[test]
fn the_growth_suite_draws_every_curve() {
    let scratch = Scratch::new();
    let small = "--size 16M --seconds 0.06 --pairs 3";
    let ran = scratch.urus(&format!("bench --suite growth {small} --json --svg charts"));
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let report: serde_json::Value = serde_json::from_str(&ran.stdout).expect("JSON");
    let curves = report["curves"].as_array().expect("a list");
    let names = [
        ("queues_read", 3),
        ("queues_overwrite", 3),
        ("chain", 6),
        ("size", 6),
        ("fragmentation", 5),
        ("fragmentation_loaded", 5),
        ("cache", 6),
        ("cluster_read", 5),
        ("cluster_allocate", 5),
        ("preallocation", 3),
    ];
    assert_eq!(curves.len(), names.len());
    for (curve, (name, points)) in curves.iter().zip(names) {
        assert_eq!(curve["name"], name);
        let rows = curve["points"].as_array().expect("a list");
        assert_eq!(rows.len(), points, "{curve}");
        for row in rows {
            let number = |path: &str| row.pointer(path).and_then(serde_json::Value::as_f64);
            for path in ["/operations-per-second", "/ratio/median", "/cpu-ratio/high"] {
                assert!(number(path).expect("a number") > 0.0, "{path} of {row}");
            }
            let chart = scratch.path(&format!("charts/growth_{name}.svg"));
            let chart = std::fs::read_to_string(chart).expect("a chart");
            let at = row["at"].as_str().expect("text");
            assert!(chart.contains(at), "{at} is not in the chart of {name}");
        }
    }
    let ran = scratch.urus("bench --clean");
    assert_eq!(ran.code, Some(0), "{ran:?}");
    scratch.sh("test ! -e urus-bench-images");
}

#[test]
fn what_does_not_go_together_is_refused() {
    let scratch = Scratch::new();
    for line in [
        "bench --suite memory --only no_such_test",
        "bench --suite memory --svg charts",
        "bench --suite memory --size 64k",
        "bench --suite growth --only no_such_test",
        "bench --suite growth --size 17M",
    ] {
        assert_eq!(scratch.urus(line).code, Some(2), "{line}");
    }
    scratch.sh("test -z \"$(ls)\"");
}
