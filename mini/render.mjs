// The pictures of mini/: seven open emoji sets, 64 × 64, as one mosaic a set (32 in a row), and their order.
//
//   npm install @resvg/resvg-js emojibase-data @iconify-json/{noto,noto-v1,twemoji,fluent-emoji,fluent-emoji-flat,emojione,fxemoji}
//   node render.mjs emoji        # writes emoji/*.png, emoji/sets.json, emoji/names.json
//
// A picture that a set lacks is left out. names.json holds Unicode's names, CLDR's tags, group and subgroup.
import { Resvg } from '@resvg/resvg-js'
import { createRequire } from 'module'
import { deflateSync, crc32 } from 'zlib'
import { mkdirSync, writeFileSync } from 'fs'

const require = createRequire(import.meta.url)
const SETS = ['noto', 'noto-v1', 'twemoji', 'fluent-emoji', 'fluent-emoji-flat', 'emojione', 'fxemoji']
// resvg ends the whole process on these three drawings, so they are left out.
const SKIP = ['noto 1F4E6', 'noto-v1 1F41E', 'noto-v1 2615']
const SIZE = 64, COLUMNS = 32, folder = process.argv[2]
if (!folder) { console.error('usage: node render.mjs FOLDER'); process.exit(2) }

const groups = require('emojibase-data/meta/groups.json')
const wanted = require('emojibase-data/en/data.json').filter(e => e.group !== undefined
  && (['animals-nature', 'food-drink', 'travel-places', 'activities', 'objects'].includes(groups.groups[e.group])
    || ['face-costume', 'cat-face', 'monkey-face', 'person-role', 'person-fantasy'].includes(groups.subgroups[e.subgroup])))

function png (rgba, width, height) { // rgba: premultiplied, as resvg gives it
  const rows = Buffer.alloc(height * (1 + 4 * width))
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const from = 4 * (y * width + x), to = y * (1 + 4 * width) + 1 + 4 * x, a = rgba[from + 3]
      for (let k = 0; k < 3; k++) rows[to + k] = a ? Math.min(255, Math.round(rgba[from + k] * 255 / a)) : 0
      rows[to + 3] = a
    }
  }
  const chunk = (type, data) => {
    const body = Buffer.concat([Buffer.from(type), data]), out = Buffer.alloc(body.length + 8)
    out.writeUInt32BE(data.length, 0); body.copy(out, 4); out.writeUInt32BE(crc32(body) >>> 0, body.length + 4)
    return out
  }
  const header = Buffer.alloc(13)
  header.writeUInt32BE(width, 0); header.writeUInt32BE(height, 4); header[8] = 8; header[9] = 6
  return Buffer.concat([Buffer.from([137, 80, 78, 71, 13, 10, 26, 10]), chunk('IHDR', header),
    chunk('IDAT', deflateSync(rows)), chunk('IEND', Buffer.alloc(0))])
}

mkdirSync(folder, { recursive: true })
const sets = {}, seen = new Set()
const charts = Object.fromEntries(SETS.map(s => [s, require(`@iconify-json/${s}/chars.json`)]))
for (const set of SETS) {
  const icons = require(`@iconify-json/${set}/icons.json`), info = require(`@iconify-json/${set}/info.json`)
  const tiles = [], order = []
  for (const emoji of wanted) {
    const h = emoji.hexcode.toLowerCase(), keys = [h, h.replace(/-fe0f/g, ''), `${h}-fe0f`]
    const names = [set, 'noto', 'twemoji', 'fluent-emoji-flat'].flatMap(s => keys.map(k => charts[s][k]))
    const icon = names.map(n => n && (icons.icons[n] ?? icons.icons[icons.aliases?.[n]?.parent])).find(Boolean)
    if (!icon || SKIP.includes(`${set} ${emoji.hexcode}`)) continue
    const box = [icon.left ?? 0, icon.top ?? 0, icon.width ?? icons.width ?? 16, icon.height ?? icons.height ?? 16]
    const svg = `<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="${box.join(' ')}" width="${SIZE}" height="${SIZE}">${icon.body}</svg>`
    const drawn = new Resvg(svg, { fitTo: { mode: 'width', value: SIZE } }).render()
    if (drawn.width !== SIZE || drawn.height !== SIZE) continue
    tiles.push(Buffer.from(drawn.pixels)); order.push(emoji.hexcode); seen.add(emoji.hexcode)
  }
  const rows = Math.ceil(tiles.length / COLUMNS), mosaic = Buffer.alloc(rows * SIZE * COLUMNS * SIZE * 4)
  tiles.forEach((tile, i) => {
    for (let y = 0; y < SIZE; y++) {
      tile.copy(mosaic, 4 * (((Math.floor(i / COLUMNS) * SIZE + y) * COLUMNS + i % COLUMNS) * SIZE), 4 * y * SIZE, 4 * (y + 1) * SIZE)
    }
  })
  writeFileSync(`${folder}/${set}.png`, png(mosaic, COLUMNS * SIZE, rows * SIZE))
  sets[set] = { package: `@iconify-json/${set}`, version: require(`@iconify-json/${set}/package.json`).version, author: info.author.name, licence: info.license.title, order }
  console.log(set, order.length)
}
writeFileSync(`${folder}/sets.json`, JSON.stringify({ sets }))
writeFileSync(`${folder}/names.json`, JSON.stringify(Object.fromEntries(wanted.filter(e => seen.has(e.hexcode)).map(e => [e.hexcode,
  { name: e.label, tags: e.tags ?? [], group: groups.groups[e.group], subgroup: groups.subgroups[e.subgroup] }]))))
