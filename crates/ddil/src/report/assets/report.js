// Connects the page's data with uPlot: colours of the theme, error bars, linked cursors, keys. Nothing is loaded.
(() => {
  "use strict";
  const root = document.documentElement;
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const figures = [...document.querySelectorAll(".chart")];
  const drawn = new Map();

  // A page from file:// may have no storage.
  const stored = (() => { try { return localStorage; } catch { return null; } })();
  const themes = ["auto", "light", "dark"];
  let theme = themes.includes(stored?.getItem("ddil-theme")) ? stored.getItem("ddil-theme") : "auto";
  const button = document.getElementById("theme");
  const showTheme = () => {
    root.dataset.theme = theme === "auto" ? (dark.matches ? "dark" : "light") : theme;
    button.querySelector("span").textContent = theme;
    drawn.forEach((plot, figure) => draw(figure));
  };
  button.addEventListener("click", () => {
    theme = themes[(themes.indexOf(theme) + 1) % themes.length];
    stored?.setItem("ddil-theme", theme);
    showTheme();
  });
  dark.addEventListener("change", showTheme);

  const color = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const short = (value) => {
    if (value == null) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e6)) return (+value.toPrecision(3)).toExponential();
    return String(+value.toPrecision(4));
  };

  // Below the lines: bands from the smallest to the largest value of a part. Above them: bars of one standard error.
  const clipped = (plot, paint) => {
    const { ctx, bbox } = plot;
    const x = (value) => plot.valToPos(value, "x", true);
    const y = (value) => plot.scales.y.distr === 3 && value <= 0 ? bbox.top + bbox.height : plot.valToPos(value, "y", true);
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    paint(ctx, x, y);
    ctx.restore();
  };
  const bands = (chart) => (plot) => clipped(plot, (ctx, x, y) => {
    ctx.globalAlpha = chart.lines.length > 2 ? 0.09 : 0.18;
    chart.lines.forEach((line, index) => {
      if (!line.lows || !plot.series[index + 1].show) return;
      const places = [...chart.xs.keys()].filter((place) => line.lows[place] != null);
      ctx.fillStyle = plot.series[index + 1].stroke();
      ctx.beginPath();
      places.forEach((place) => ctx.lineTo(x(chart.xs[place]), y(line.lows[place])));
      places.reverse().forEach((place) => ctx.lineTo(x(chart.xs[place]), y(line.highs[place])));
      ctx.fill();
    });
  });
  const errorBars = (chart) => (plot) => clipped(plot, (ctx, x, y) => {
    ctx.lineWidth = 1.5 * devicePixelRatio;
    ctx.setLineDash([]);
    chart.lines.forEach((line, index) => {
      if (!line.errors || !plot.series[index + 1].show) return;
      ctx.strokeStyle = plot.series[index + 1].stroke();
      line.errors.forEach((error, place) => {
        const mean = plot.data[index + 1][place];
        if (error == null || mean == null) return;
        const middle = x(chart.xs[place]), cap = 3 * devicePixelRatio, ends = [y(mean - error), y(mean + error)];
        ctx.beginPath();
        ctx.moveTo(middle, ends[0]); ctx.lineTo(middle, ends[1]);
        for (const end of ends) { ctx.moveTo(middle - cap, end); ctx.lineTo(middle + cap, end); }
        ctx.stroke();
      });
    });
  });

  // The range of the values that are shown, with their error bars; on a logarithmic scale it ends at round numbers.
  const round = (value, to) => { const power = 10 ** Math.floor(Math.log10(value)); return to(value / power) * power; };
  const range = (chart, isLog) => (plot, low, high) => {
    if (low == null) return isLog ? [0.1, 1] : [0, 1];
    const reach = (from, to) => {
      if (!isLog || from > 0) low = Math.min(low, from);
      high = Math.max(high, to);
    };
    chart.lines.forEach((line, index) => {
      if (!plot.series[index + 1].show) return;
      line.lows?.forEach((from, place) => { if (from != null) reach(from, line.highs[place]); });
      line.errors?.forEach((error, place) => {
        const mean = plot.data[index + 1][place];
        if (error != null && mean != null) reach(mean - error, mean + error);
      });
    });
    return isLog ? [round(low / 1.02, Math.floor), round(high * 1.02, Math.ceil)] : uPlot.rangeNum(low, high, 0.1, true);
  };

  const placesAxis = (chart) => ({
    splits: () => chart.xs.filter((_, place) => place % Math.ceil(chart.xs.length / 9) === 0),
    values: (plot, splits) => splits.map((place) => chart.places[place]),
  });

  const options = (chart, width, isLog, shown) => {
    const axis = { stroke: color("--quiet"), grid: { stroke: color("--line"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
    const isPlaces = Boolean(chart.places);
    // Points where most positions have none, as of evaluations.
    const hasPoints = (line) => isPlaces || chart.xs.length < 4 || line.values.filter((value) => value != null).length * 3 < chart.xs.length;
    const series = chart.lines.map((line, index) => {
      const stroke = line.is_level ? color("--quiet") : color(line.color == null ? "--neutral" : "--c" + line.color % 7);
      return {
        label: line.name, stroke, width: line.is_level ? 1 : 1.6, show: shown?.[index] ?? !line.is_hidden, spanGaps: true,
        dash: line.is_level ? [[6, 4], [2, 3], [10, 3, 2, 3]][index % 3] : line.color >= 7 ? [5, 3] : undefined,
        points: { show: hasPoints(line) && !line.is_level, size: 6, fill: stroke },
        value: (plot, value, s, at) => {
          const error = at == null ? null : line.errors?.[at];
          return short(value) + (error == null ? "" : " ± " + String(+error.toPrecision(2)));
        },
      };
    });
    return {
      width, height: 230, series: [{ label: chart.x_title, value: (plot, x) => x == null ? "–" : isPlaces ? chart.places[x] : String(x) }, ...series],
      cursor: { points: { size: 6 }, drag: { x: !isPlaces, y: false }, focus: { prox: 16 }, ...(chart.group ? { sync: { key: chart.group, setSeries: false } } : {}) },
      focus: { alpha: 0.35 }, padding: [8, 26, 0, 0],
      legend: { markers: { width: 2, dash: (plot, index) => plot.series[index].dash ? "dashed" : "solid" } },
      scales: {
        x: { time: false, range: isPlaces ? [-0.4, chart.xs.length - 0.6] : chart.xs.length > 1 ? undefined : [chart.xs[0] - 1, chart.xs[0] + 1] },
        y: { distr: isLog ? 3 : 1, range: range(chart, isLog) },
      },
      axes: [
        { ...axis, size: 30, grid: { show: false }, ...(isPlaces ? placesAxis(chart) : {}) },
        { ...axis, size: 58, values: (plot, splits) => splits.map((value) => value == null ? "" : short(value)) },
      ],
      // Without a cursor the legend shows the last values.
      hooks: { drawAxes: [bands(chart)], draw: [errorBars(chart)], setLegend: [(plot) => { if (plot.legend.idx == null) plot.setLegend({ idx: chart.xs.length - 1 }); }] },
    };
  };

  function draw(figure) {
    const chart = charts[figure.dataset.chart], box = figure.querySelector(".plot");
    const before = drawn.get(figure), isLog = figure.querySelector("[data-log]")?.checked ?? false;
    const shown = before?.series.slice(1).map((series) => series.show);
    before?.destroy();
    // A logarithm of zero does not exist: such values are gaps.
    const values = chart.lines.map((line) => isLog ? line.values.map((value) => value > 0 ? value : null) : line.values);
    const plot = new uPlot(options(chart, box.clientWidth, isLog, shown), [chart.xs, ...values], box);
    plot.setLegend({ idx: chart.xs.length - 1 });
    drawn.set(figure, plot);
    // The legend toggles by click; here also by key.
    plot.root.querySelectorAll(".u-legend .u-series:not(:first-child) th").forEach((name) => {
      name.tabIndex = 0;
      name.setAttribute("role", "button");
      name.title = "Show or hide; with Ctrl: show only this line";
      name.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        name.click();
      });
    });
    figure.dataset.drawn = "true";
  }

  const moveCursor = (figure) => (event) => {
    const side = { ArrowLeft: -1, ArrowRight: 1 }[event.key], plot = drawn.get(figure);
    if (!side || event.target !== event.currentTarget) return;
    event.preventDefault();
    const last = plot.data[0].length - 1, at = plot.cursor.idx ?? (side > 0 ? -1 : last + 1);
    const x = plot.data[0][Math.min(last, Math.max(0, at + side))];
    plot.setCursor({ left: plot.valToPos(x, "x"), top: plot.over.clientHeight / 2 }, true, true);
  };

  const resized = new ResizeObserver((entries) => entries.forEach(({ target }) => {
    const plot = drawn.get(target.closest(".chart")), width = target.clientWidth;
    if (plot && width > 0 && Math.abs(plot.width - width) > 1) plot.setSize({ width, height: plot.height });
  }));

  showTheme();
  figures.forEach((figure) => {
    draw(figure);
    figure.querySelector("[data-log]")?.addEventListener("change", () => draw(figure));
    const box = figure.querySelector(".plot");
    box.addEventListener("keydown", moveCursor(figure));
    resized.observe(box);
  });

  const slider = document.getElementById("frame");
  slider?.addEventListener("input", () => {
    const frames = document.querySelectorAll(".frame");
    frames.forEach((frame, index) => { frame.hidden = index !== +slider.value; });
    document.getElementById("frame-step").textContent = frames[slider.value].dataset.step;
  });

  const reload = document.getElementById("reload");
  if (reload) setInterval(() => { if (reload.checked && !document.hidden) location.reload(); }, 10000);
})();
