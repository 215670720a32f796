//! Charts: a bar for each test's ratio, with its interval.

use std::path::Path;

use plotters::prelude::*;

use super::spread::Spread;
use crate::failure::Failure;

const WIDTH: u32 = 900;
const ROW_HEIGHT: u32 = 22;

/// Draws `ratios.svg` into the directory, which is made if need be.
pub(super) fn draw(dir: &Path, caption: &str, rows: &[(String, Spread)]) -> Result<(), Failure> {
    std::fs::create_dir_all(dir)
        .map_err(|error| Failure::new(format!("cannot make {}: {error}", dir.display())))?;
    let path = dir.join("ratios.svg");
    std::fs::write(&path, ratios(caption, rows)?)
        .map_err(|error| Failure::new(format!("cannot write {}: {error}", path.display())))
}

fn ratios(caption: &str, rows: &[(String, Spread)]) -> Result<String, Failure> {
    let mut svg = String::new();
    if !rows.is_empty() {
        bars(&mut svg, caption, rows)
            .map_err(|error| Failure::new(format!("cannot draw a chart: {error}")))?;
    }
    Ok(svg)
}

fn bars(
    svg: &mut String,
    caption: &str,
    rows: &[(String, Spread)],
) -> Result<(), Box<dyn std::error::Error>> {
    let count = u32::try_from(rows.len())?;
    let most = rows.iter().map(|(_, ratio)| ratio.high).fold(1.0, f64::max) * 1.1;
    let area = SVGBackend::with_string(svg, (WIDTH, 90 + ROW_HEIGHT * count)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(caption, ("sans-serif", 16))
        .margin(10)
        .x_label_area_size(30)
        .y_label_area_size(230)
        .build_cartesian_2d(0.0..most, (0..count).into_segmented())?;
    let name = |place: &SegmentValue<u32>| match place {
        // The first on top. The axis has one place more than there are rows.
        SegmentValue::CenterOf(at) if *at < count => {
            usize::try_from(count - 1 - at).map_or_else(|_| String::new(), |at| rows[at].0.clone())
        }
        _ => String::new(),
    };
    chart
        .configure_mesh()
        .disable_y_mesh()
        .y_labels(rows.len() + 1)
        .y_label_formatter(&name)
        .draw()?;
    for (at, (_, ratio)) in (0..count).rev().zip(rows) {
        let from = SegmentValue::Exact(at);
        let to = SegmentValue::Exact(at + 1);
        let mut bar = Rectangle::new([(0.0, from), (ratio.median, to)], BLUE.mix(0.5).filled());
        bar.set_margin(3, 3, 0, 0);
        let middle = SegmentValue::CenterOf(at);
        let interval = PathElement::new([(ratio.low, middle.clone()), (ratio.high, middle)], BLACK);
        chart.draw_series([bar])?;
        chart.draw_series([interval])?;
    }
    // Where both are the same.
    let line = [
        (1.0, SegmentValue::Exact(0)),
        (1.0, SegmentValue::Exact(count)),
    ];
    chart.draw_series([PathElement::new(line, RED)])?;
    area.present()?;
    Ok(())
}
