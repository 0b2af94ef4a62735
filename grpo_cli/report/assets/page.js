"use strict";
// What the other scripts share. What a run says is put into the page as text: nothing here makes HTML of it.

function parsed(id) {
  return JSON.parse(document.getElementById(id).textContent);
}

// An element with properties and children; strings among these become text.
function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function colour(place) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--colour-${place % 8}`).trim();
}

function shown(value) {
  if (value === null) return "–";
  return Math.abs(value) >= 1e-3 && Math.abs(value) < 1e5 || value === 0
    ? String(Number(value.toPrecision(4))) : value.toExponential(2);
}

// Work that the page does not wait for, in order; what is in view may go first.
const queue = {
  jobs: [],
  isRunning: false,
  add(job) {
    this.jobs.push(job);
    if (!this.isRunning) this.next();
  },
  first(job) {
    const place = this.jobs.indexOf(job);
    if (place > 0) this.jobs.unshift(...this.jobs.splice(place, 1));
  },
  next() {
    this.isRunning = true;
    setTimeout(() => {
      const job = this.jobs.shift();
      job();
      if (this.jobs.length) this.next();
      else {
        this.isRunning = false;
        document.documentElement.dataset.drawn = "true";
      }
    });
  },
};
