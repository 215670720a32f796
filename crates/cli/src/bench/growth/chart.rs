//! A chart of each curve: operations per second on the left, processor time per operation on the right.

use std::path::Path;

use plotters::prelude::*;

use super::Measured;
use crate::failure::Failure;

const SIZE: (u32, u32) = (720, 400);

/// Draws `growth_NAME.svg` into the directory, which is made if need be.
pub(super) fn draw(dir: &Path, curve: &Measured) -> Result<(), Failure> {
    std::fs::create_dir_all(dir)
        .map_err(|error| Failure::new(format!("cannot make {}: {error}", dir.display())))?;
    let path = dir.join(format!("growth_{}.svg", curve.name));
    let mut svg = String::new();
    lines(&mut svg, curve)
        .map_err(|error| Failure::new(format!("cannot draw a chart: {error}")))?;
    std::fs::write(&path, svg)
        .map_err(|error| Failure::new(format!("cannot write {}: {error}", path.display())))
}

fn lines(svg: &mut String, curve: &Measured) -> Result<(), Box<dyn std::error::Error>> {
    let points = &curve.points;
    let count = u32::try_from(points.len())?;
    let most = |value: fn(&super::Row) -> f64| points.iter().map(value).fold(0.0, f64::max) * 1.1;
    let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(curve.title, ("sans-serif", 16))
        .margin(10)
        .x_label_area_size(45)
        .y_label_area_size(80)
        .right_y_label_area_size(60)
        .build_cartesian_2d(
            (0..count).into_segmented(),
            0.0..most(|row| row.operations_per_second),
        )?
        .set_secondary_coord(
            (0..count).into_segmented(),
            0.0..most(|row| row.cpu_microseconds_per_operation),
        );
    let name = |place: &SegmentValue<u32>| match place {
        SegmentValue::CenterOf(at) => usize::try_from(*at)
            .ok()
            .and_then(|at| points.get(at))
            .map_or_else(String::new, |row| row.at.clone()),
        _ => String::new(),
    };
    chart
        .configure_mesh()
        .disable_x_mesh()
        .x_labels(points.len() + 1)
        .x_label_formatter(&name)
        .x_desc(curve.axis)
        .y_desc("operations per second")
        .y_label_formatter(&|value| format!("{value:.0}"))
        .draw()?;
    chart
        .configure_secondary_axes()
        .y_desc("CPU µs per operation")
        .y_label_formatter(&|value| format!("{value:.1}"))
        .draw()?;
    let line = |value: fn(&super::Row) -> f64| {
        (0..count)
            .zip(points)
            .map(move |(at, row)| (SegmentValue::CenterOf(at), value(row)))
    };
    let rates = || line(|row| row.operations_per_second);
    chart
        .draw_series(LineSeries::new(rates(), BLUE.stroke_width(2)))?
        .label("operations per second")
        .legend(|(x, y)| PathElement::new([(x, y), (x + 15, y)], BLUE.stroke_width(2)));
    chart.draw_series(rates().map(|at| Circle::new(at, 3, BLUE.filled())))?;
    let costs = || line(|row| row.cpu_microseconds_per_operation);
    chart
        .draw_secondary_series(LineSeries::new(costs(), RED.stroke_width(2)))?
        .label("CPU per operation")
        .legend(|(x, y)| PathElement::new([(x, y), (x + 15, y)], RED.stroke_width(2)));
    chart.draw_secondary_series(costs().map(|at| Circle::new(at, 3, RED.filled())))?;
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperMiddle)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    area.present()?;
    Ok(())
}
