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
        let mut line = Line {
            image: &self.image,
            other: None,
            message: String::new(),
            fields: String::new(),
        };
        event.record(&mut line);
        SystemTime.format_time(&mut writer)?;
        // A server may have several images, and an image several files.
        let image = line.other.as_deref().unwrap_or(&self.image);
        write!(writer, " {} {image}:", event.metadata().level())?;
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
    /// What it is about instead.
    other: Option<String>,
    message: String,
    fields: String,
}

impl Visit for Line<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() != "image" {
            self.record_debug(field, &value);
        } else if value != self.image {
            self.other = Some(value.to_owned());
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a string cannot fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            "image" => {
                let text = format!("{value:?}");
                self.other = (text != self.image).then_some(text);
                Ok(())
            }
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}
