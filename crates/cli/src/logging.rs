//! Log lines on standard error, each with the image's name.

use std::fmt::{self, Write as _};
use std::path::Path;

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, FormattedFields};
use tracing_subscriber::registry::LookupSpan;

/// Begins to log: warnings and errors, and more the more often `-v` was given.
pub(crate) fn start(verbose: u8, image: &Path) {
    let level = match verbose {
        0 => Level::WARN,
        1 => Level::INFO,
        2 => Level::DEBUG,
        _ => Level::TRACE,
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        // It would panic where standard error is closed.
        .log_internal_errors(false)
        .event_format(Lines {
            image: image.display().to_string(),
        })
        .init();
}

/// `TIME LEVEL IMAGE: span{fields}: message field=value`.
struct Lines {
    image: String,
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        ctx: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        SystemTime.format_time(&mut writer)?;
        write!(writer, " {} {}:", event.metadata().level(), self.image)?;
        for span in ctx
            .event_scope()
            .into_iter()
            .flat_map(|scope| scope.from_root())
        {
            write!(writer, " {}", span.name())?;
            if let Some(fields) = span.extensions().get::<FormattedFields<N>>() {
                let fields = self.without_image(&fields.fields);
                if !fields.is_empty() {
                    write!(writer, "{{{fields}}}")?;
                }
            }
            writer.write_char(':')?;
        }
        let mut line = Line {
            image: &self.image,
            message: String::new(),
            fields: String::new(),
        };
        event.record(&mut line);
        writeln!(writer, " {}{}", line.message, line.fields)
    }
}

impl Lines {
    /// A span's fields, less the image's name, which the line has already.
    fn without_image<'a>(&self, fields: &'a str) -> &'a str {
        let rest = fields.strip_prefix("image=").map(|rest| {
            rest.strip_prefix(&format!("{:?}", self.image))
                .or_else(|| rest.strip_prefix(&self.image))
        });
        match rest {
            Some(Some(rest)) => rest.trim_start(),
            _ => fields,
        }
    }
}

/// Collects an event's message and fields.
struct Line<'a> {
    image: &'a str,
    message: String,
    fields: String,
}

impl Visit for Line<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() != "image" || value != self.image {
            self.record_debug(field, &value);
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a string cannot fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            "image" if format!("{value:?}") == self.image => Ok(()),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}
