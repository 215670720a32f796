//! The metrics themselves, in Prometheus's text format. Names and labels are documented in docs/METRICS.md.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet, prometheus_text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;
use urus::{Histogram, OperationStatistics, Statistics};

use crate::control::Controlled;

/// Whose metrics are given.
#[derive(Clone, Debug)]
pub(crate) struct Sources {
    pub(crate) images: Vec<Controlled>,
    pub(crate) nbd: Option<urus_nbd::Monitor>,
    pub(crate) vhost_user: Option<urus_vhost_user::Monitor>,
}

/// The metrics at this moment.
pub(super) fn text(sources: &Sources) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(sources.clone()));
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = prometheus_text::encode(&mut text, &registry);
    text
}

/// A metric's name, what it tells, and where it is found.
type Metric<T> = (&'static str, &'static str, fn(&T) -> u64);

type Labels<'a> = [(&'static str, &'a str)];

/// An image's numbers, with what is said of each of them.
struct Seen {
    image: String,
    export: String,
    format: String,
    statistics: Statistics,
    queues: Vec<String>,
}

impl Seen {
    fn of(Controlled { name, device }: &Controlled) -> Self {
        let statistics = device.statistics();
        Self {
            image: device.name().to_owned(),
            export: name.clone(),
            format: device.format().to_string(),
            queues: (0..statistics.queues.len())
                .map(|number| number.to_string())
                .collect(),
            statistics,
        }
    }

    fn labels(&self) -> [(&'static str, &str); 2] {
        [("image", &self.image), ("export", &self.export)]
    }
}

impl Collector for Sources {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut families = Families(encoder);
        let seen: Vec<Seen> = self.images.iter().map(Seen::of).collect();
        families.write("urus_build", "The program", MetricType::Info, |family| {
            family.encode_info(&[("version", env!("CARGO_PKG_VERSION"))])
        })?;
        images(&mut families, &seen)?;
        caches(&mut families, &seen)?;
        changes(&mut families, &seen)?;
        queues(&mut families, &seen)?;
        operations(&mut families, &seen)?;
        self.servers(&mut families)
    }
}

impl Sources {
    fn servers(&self, families: &mut Families<'_>) -> fmt::Result {
        if let Some(nbd) = &self.nbd {
            let connections = nbd.connections() as u64;
            families.number(
                "urus_nbd_connections",
                "NBD clients connected",
                MetricType::Gauge,
                connections,
            )?;
        }
        let Some(vhost_user) = &self.vhost_user else {
            return Ok(());
        };
        families.number(
            "urus_vhost_user_connected",
            "Whether a front end is connected",
            MetricType::Gauge,
            vhost_user.is_connected().into(),
        )?;
        let stats = vhost_user.stats();
        for (name, help, value) in [
            (
                "urus_vhost_user_batches",
                "Times that the guest's requests were started, one system call each",
                stats.batches,
            ),
            (
                "urus_vhost_user_calls",
                "Times that the guest was told of requests that had ended",
                stats.calls,
            ),
            (
                "urus_vhost_user_failed_requests",
                "The guest's requests that ended with an error, invalid ones included",
                stats.failed,
            ),
            (
                "urus_vhost_user_resubmitted_requests",
                "Requests done again that an earlier process had left",
                stats.resubmitted,
            ),
        ] {
            families.number(name, help, MetricType::Counter, value)?;
        }
        Ok(())
    }
}

fn images(families: &mut Families<'_>, seen: &[Seen]) -> fmt::Result {
    families.write(
        "urus_image",
        "The image's format, and what does the I/O of its metadata",
        MetricType::Info,
        |family| {
            for seen in seen {
                let labels = [
                    ("image", &*seen.image),
                    ("export", &seen.export),
                    ("format", &seen.format),
                    ("driver", seen.statistics.driver),
                ];
                family.encode_info(&labels)?;
            }
            Ok(())
        },
    )?;
    let gauges: [Metric<Statistics>; 5] = [
        ("urus_image_size_bytes", "Size of the virtual disk", |s| {
            s.size
        }),
        (
            "urus_image_chain_depth",
            "Files in the chain: 1 without a backing file",
            |s| s.chain_depth as u64,
        ),
        (
            "urus_image_read_only",
            "Whether everything that changes the disk is refused",
            |s| s.read_only.into(),
        ),
        (
            "urus_image_paused",
            "Whether requests wait until the image is resumed",
            |s| s.paused.into(),
        ),
        (
            "urus_image_poisoned",
            "Whether a sync has failed, so that writes are refused until the image is opened again",
            |s| s.poisoned.into(),
        ),
    ];
    families.per_image(seen, MetricType::Gauge, &gauges)
}

fn caches(families: &mut Families<'_>, seen: &[Seen]) -> fmt::Result {
    let counters: [Metric<Statistics>; 5] = [
        (
            "urus_mapping_cache_hits",
            "Look-ups in L2 tables that the mapping cache has answered",
            |s| s.counters.mapping_hits,
        ),
        (
            "urus_mapping_cache_misses",
            "Slices of L2 tables read because they were not cached",
            |s| s.counters.slice_loads,
        ),
        (
            "urus_mapping_cache_evictions",
            "Slices of L2 tables that made room for others",
            |s| s.counters.evicted_slices,
        ),
        (
            "urus_decoded_cache_hits",
            "Compressed clusters found decoded",
            |s| s.counters.decoded_hits,
        ),
        (
            "urus_decoded_cache_misses",
            "Compressed clusters decoded because they were not cached",
            |s| s.counters.decoded_clusters,
        ),
    ];
    families.per_image(seen, MetricType::Counter, &counters)
}

fn changes(families: &mut Families<'_>, seen: &[Seen]) -> fmt::Result {
    let counters: [Metric<Statistics>; 5] = [
        (
            "urus_allocated_clusters",
            "Clusters that came into use, for data or for metadata",
            |s| s.counters.allocated_clusters,
        ),
        (
            "urus_freed_clusters",
            "Clusters that went out of use",
            |s| s.counters.freed_clusters,
        ),
        (
            "urus_copy_on_write_bytes",
            "Bytes copied to complete partly written clusters",
            |s| s.counters.copied_bytes,
        ),
        ("urus_commits", "Commits of metadata", |s| {
            s.counters.commits
        }),
        ("urus_barriers", "Syncs of the image (fdatasync)", |s| {
            s.counters.barriers
        }),
    ];
    families.per_image(seen, MetricType::Counter, &counters)
}

fn queues(families: &mut Families<'_>, seen: &[Seen]) -> fmt::Result {
    let queues = || {
        seen.iter().flat_map(|seen| {
            let numbered = seen.queues.iter().zip(&seen.statistics.queues);
            numbered.map(move |(number, queue)| (seen, number.as_str(), queue))
        })
    };
    families.write(
        "urus_queue",
        "A queue that is in use, and what does its I/O",
        MetricType::Info,
        |family| {
            for (seen, number, queue) in queues() {
                if let Some(driver) = queue.driver {
                    let [image, export] = seen.labels();
                    let labels = [image, export, ("queue", number), ("driver", driver)];
                    family.encode_info(&labels)?;
                }
            }
            Ok(())
        },
    )?;
    families.write(
        "urus_requests_in_flight",
        "Requests that have begun and not ended",
        MetricType::Gauge,
        |family| {
            for (seen, number, queue) in queues() {
                let [image, export] = seen.labels();
                let labels = [image, export, ("queue", number)];
                number_of(family, &labels, MetricType::Gauge, queue.in_flight)?;
            }
            Ok(())
        },
    )
}

fn operations(families: &mut Families<'_>, seen: &[Seen]) -> fmt::Result {
    let kinds: Vec<([(&str, &str); 4], &OperationStatistics)> = seen
        .iter()
        .flat_map(|seen| {
            seen.queues
                .iter()
                .zip(&seen.statistics.queues)
                .map(move |queue| (seen, queue))
        })
        .flat_map(|(seen, (number, queue))| {
            let [image, export] = seen.labels();
            queue.by_kind().map(move |(kind, numbers)| {
                ([image, export, ("queue", number), ("kind", kind)], numbers)
            })
        })
        .collect();
    let counters: [Metric<OperationStatistics>; 3] = [
        ("urus_operations", "Requests that succeeded", |kind| {
            kind.operations
        }),
        (
            "urus_operation_bytes",
            "Bytes of the requests that succeeded",
            |kind| kind.bytes,
        ),
        ("urus_operation_errors", "Requests that failed", |kind| {
            kind.errors
        }),
    ];
    for (name, help, read) in counters {
        families.write(name, help, MetricType::Counter, |family| {
            for (labels, numbers) in &kinds {
                number_of(family, labels, MetricType::Counter, read(numbers))?;
            }
            Ok(())
        })?;
    }
    families.write(
        "urus_operation_duration_seconds",
        "How long requests took that succeeded",
        MetricType::Histogram,
        |family| {
            for (labels, OperationStatistics { latency, .. }) in &kinds {
                // A kind that a queue never had has nothing to say in so many lines.
                if latency.count() > 0 {
                    histogram(family, labels, latency)?;
                }
            }
            Ok(())
        },
    )
}

fn histogram(
    family: &mut MetricEncoder<'_>,
    labels: &Labels<'_>,
    latency: &Histogram,
) -> fmt::Result {
    let end = |bucket| Histogram::end(bucket).map_or(f64::INFINITY, |end| end.as_secs_f64());
    let buckets: Vec<(f64, u64)> = latency
        .counts
        .iter()
        .enumerate()
        .map(|(bucket, count)| (end(bucket), *count))
        .collect();
    family
        .encode_family(&labels)?
        .encode_histogram::<NoLabelSet>(latency.sum.as_secs_f64(), latency.count(), &buckets, None)
}

/// Writes metrics, each with all its series.
struct Families<'a>(DescriptorEncoder<'a>);

impl Families<'_> {
    fn write(
        &mut self,
        name: &str,
        help: &str,
        kind: MetricType,
        series: impl FnOnce(&mut MetricEncoder<'_>) -> fmt::Result,
    ) -> fmt::Result {
        series(&mut self.0.encode_descriptor(name, help, None, kind)?)
    }

    fn number(&mut self, name: &str, help: &str, kind: MetricType, value: u64) -> fmt::Result {
        self.write(name, help, kind, |family| {
            number_of(family, &[], kind, value)
        })
    }

    fn per_image(
        &mut self,
        seen: &[Seen],
        kind: MetricType,
        metrics: &[Metric<Statistics>],
    ) -> fmt::Result {
        for (name, help, read) in metrics {
            self.write(name, help, kind, |family| {
                for seen in seen {
                    number_of(family, &seen.labels(), kind, read(&seen.statistics))?;
                }
                Ok(())
            })?;
        }
        Ok(())
    }
}

/// One series of a counter or gauge.
fn number_of(
    family: &mut MetricEncoder<'_>,
    labels: &Labels<'_>,
    kind: MetricType,
    value: u64,
) -> fmt::Result {
    let mut series = family.encode_family(&labels)?;
    if kind == MetricType::Counter {
        series.encode_counter::<NoLabelSet, u64, f64>(&value, None)
    } else {
        series.encode_gauge(&value)
    }
}
