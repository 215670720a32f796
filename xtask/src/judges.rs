//! What is to notice a mutant: which tests and which parts of the simulator it is shown to, and in which order.

/// Something that may notice a mutant.
pub(crate) struct Judge {
    pub(crate) name: &'static str,
    /// What cargo builds for it.
    pub(crate) build: &'static [&'static str],
    pub(crate) run: Run,
    /// Processor time it may take, some times what it needs: a mutant may loop without end.
    pub(crate) seconds: u64,
}

pub(crate) enum Run {
    /// The simulator, built before.
    Simulator(&'static [&'static str]),
    /// The tests that were built, chosen by what their harness is told.
    Tests(&'static [&'static str]),
}

const SIMULATOR: &[&str] = &["build", "-p", "urus-sim", "--bin", "urus-sim"];

const fn simulator(name: &'static str, arguments: &'static [&'static str], seconds: u64) -> Judge {
    Judge {
        name,
        build: SIMULATOR,
        run: Run::Simulator(arguments),
        seconds,
    }
}

const fn format(build: &'static [&'static str]) -> Judge {
    Judge {
        name: "format",
        build,
        run: Run::Tests(&[]),
        seconds: 60,
    }
}

/// The format's own tests, but for those that ask QEMU: they take a second, and longer to link.
const FORMAT: Judge = format(&[
    "test",
    "-p",
    "urus-format",
    "--lib",
    "--test",
    "entry",
    "--test",
    "header",
    "--test",
    "compressed",
    "--test",
    "create",
    "--test",
    "geometry",
    "--test",
    "limits",
]);

/// Those of them that are about a file, by the end of its name: most of its mutants go no further.
const FORMAT_OWN: [(&str, Judge); 6] = [
    (
        "src/entry.rs",
        format(&["test", "-p", "urus-format", "--test", "entry"]),
    ),
    (
        "src/geometry.rs",
        format(&["test", "-p", "urus-format", "--test", "geometry"]),
    ),
    (
        "src/create.rs",
        format(&["test", "-p", "urus-format", "--test", "create"]),
    ),
    (
        "src/compressed.rs",
        format(&["test", "-p", "urus-format", "--test", "compressed"]),
    ),
    (
        "header/limits.rs",
        format(&["test", "-p", "urus-format", "--test", "limits"]),
    ),
    (
        "",
        format(&[
            "test",
            "-p",
            "urus-format",
            "--lib",
            "--test",
            "header",
            "--test",
            "limits",
        ]),
    ),
];

const FORMAT_QEMU: Judge = Judge {
    name: "format-qemu",
    build: &["test", "-p", "urus-format", "--test", "qemu_img"],
    run: Run::Tests(&[]),
    seconds: 60,
};

const ENGINE: &[&str] = &["test", "-p", "urus-engine", "--lib"];

/// The engine's own tests, but for those of its check.
const UNITS: Judge = Judge {
    name: "units",
    build: ENGINE,
    run: Run::Tests(&["--skip", "check::"]),
    seconds: 60,
};

/// Devices over damaged images, and on full disks.
const DAMAGED: Judge = Judge {
    name: "damaged",
    build: &[
        "test", "-p", "urus-sim", "--test", "damaged", "--test", "refused", "--test", "full",
    ],
    run: Run::Tests(&[]),
    seconds: 60,
};

/// All of the engine's own tests: those of the check read what the format's code wrote.
const WHOLE_ENGINE: Judge = Judge {
    name: "engine",
    build: ENGINE,
    run: Run::Tests(&[]),
    seconds: 120,
};

/// The simulator's parts, each at its smallest but in all configurations, and more of the one that moves the refcount table.
const JUDGES: [Judge; 5] = [
    simulator(
        "sequences",
        &["--part", "sequences", "--states", "5000", "--qemu", "0"],
        8,
    ),
    simulator(
        "cuts",
        &[
            "--part", "cuts", "--cuts", "3", "--states", "10000", "--qemu", "0",
        ],
        30,
    ),
    simulator(
        "errors",
        &[
            "--part",
            "errors",
            "--injections",
            "4",
            "--states",
            "5000",
            "--qemu",
            "0",
        ],
        40,
    ),
    simulator(
        "model",
        &["--part", "model", "--states", "5000", "--qemu", "0"],
        40,
    ),
    simulator(
        "table",
        &[
            "--part",
            "cuts",
            "--config",
            "refcount table grows",
            "--cuts",
            "3",
            "--states",
            "1500",
            "--qemu",
            "0",
        ],
        40,
    ),
];

/// Judges of a file, in order: those that know it best come first, those that take longest last.
pub(crate) fn of(file: &str) -> Vec<&'static Judge> {
    let simulator = JUDGES.iter();
    if file.starts_with("crates/format/") {
        let own = FORMAT_OWN.iter().find(|(name, _)| file.ends_with(name));
        own.map(|(_, judge)| judge)
            .into_iter()
            .chain([&FORMAT])
            .chain(simulator)
            .chain([&WHOLE_ENGINE, &FORMAT_QEMU])
            .collect()
    } else if ["alloc.rs", "refcounts.rs", "frames.rs"]
        .iter()
        .any(|own| file.ends_with(own))
    {
        let own = std::iter::once(&UNITS);
        own.chain(simulator).chain([&DAMAGED]).collect()
    } else {
        simulator.chain([&UNITS, &DAMAGED]).collect()
    }
}

/// Each that is measured before the first mutant.
pub(crate) fn all() -> impl Iterator<Item = &'static Judge> {
    [&FORMAT, &FORMAT_QEMU, &UNITS, &WHOLE_ENGINE, &DAMAGED]
        .into_iter()
        .chain(&JUDGES)
}
