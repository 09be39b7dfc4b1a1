-- lib.lua: what every script that changes a room shares. It is put in front
-- of the script, so all of it is local and nothing runs by itself.
--
-- A record (one field of a room's hash, see codec.go) is
--   entry incarnation seq joinedAt ttl metaVersion stateVersion flag stateUntil metaLength \n meta state
-- with times in ms. Users' JSON stays bytes: its length says where it ends.

local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)

local function int(n)
  return string.format('%d', n)
end

local nowText = int(now)

local function decode(s)
  local _, stop, entry, inc, seq, at, ttl, mv, sv, flag, til, ml = string.find(s,
    '^(%S+) (%S+) (%d+) (%d+) (%d+) (%d+) (%d+) (%S) (%d+) (%d+)\n')
  if not stop then
    return nil
  end
  local cut = stop + tonumber(ml)
  return {
    entry = entry, inc = inc, seq = seq, at = at, ttl = ttl, mv = mv, sv = sv, flag = flag, til = til,
    meta = string.sub(s, stop + 1, cut), state = string.sub(s, cut + 1),
  }
end

local function encode(r, meta, state)
  return r.entry .. ' ' .. r.inc .. ' ' .. r.seq .. ' ' .. r.at .. ' ' .. r.ttl .. ' ' .. r.mv .. ' ' .. r.sv ..
    ' ' .. r.flag .. ' ' .. r.til .. ' ' .. #meta .. '\n' .. meta .. state
end

-- Changes of indexes are made together when the script ends (flush): per key
-- and member whether it is to be in. Nobody else sees anything before that.
local indexes = {}

local function index(key, member, present)
  local i = indexes[key]
  if not i then
    i = { members = {}, present = {} }
    indexes[key] = i
    indexes[#indexes + 1] = key
  end
  if i.present[member] == nil then
    i.members[#i.members + 1] = member
  end
  i.present[member] = present
end

local function flush()
  for _, key in ipairs(indexes) do
    local add, drop = { key }, { key }
    for _, member in ipairs(indexes[key].members) do
      local list = indexes[key].present[member] and add or drop
      list[#list + 1] = member
    end
    if #drop > 1 then
      redis.call('SREM', unpack(drop))
    end
    if #add > 1 then
      redis.call('SADD', unpack(add))
    end
  end
end

-- Where rooms stand, read once per call and room: epoch, seq (as a number and as
-- text), tag, and of incarnations how many entries they have in it.
local positions = {}

-- advance moves a room one event on, and counts in the same write that
-- incarnation inc has so many entries more or fewer in it (by 0: inc may be
-- nil): so a frame for the room finds the servers to go to. It is the first
-- write of every change: where Redis refuses writes (out of memory, wrong type)
-- it refuses this one, and nothing else has been done. Returns the position and
-- the tag before it, or nil and the error.
local function advance(key, epoch, tag, inc, by)
  local p = positions[key]
  local field = by ~= 0 and '@' .. inc
  if not p then
    local h = redis.pcall('HMGET', key, 'e', 's', 't', field or 't')
    if h.err then
      return nil, h.err
    end
    p = { e = h[1], s = tonumber(h[2] or '0'), t = h[3] or '-', homes = {} }
    if field then
      p.homes[field] = tonumber(h[4] or '0')
    end
  elseif field and not p.homes[field] then
    p.homes[field] = tonumber(redis.call('HGET', key, field) or '0')
  end
  local write = { 's', int(p.s + 1), 't', tag }
  local count = field and p.homes[field] + by
  if not p.e then
    write[5], write[6] = 'e', epoch
  end
  if count and count > 0 then
    write[#write + 1] = field
    write[#write + 1] = count
  end
  local w = redis.pcall('HSET', key, unpack(write))
  if type(w) == 'table' and w.err then
    return nil, w.err
  end
  if count then
    if count <= 0 then
      redis.call('HDEL', key, field)
      count = 0
    end
    p.homes[field] = count
  end
  local prev = p.t
  p.fresh = not p.e
  p.e, p.s, p.text, p.t = p.e or epoch, p.s + 1, write[2], tag
  positions[key] = p
  return p, prev
end

local function publish(channel, kind, p, prev, cause, conn, record)
  redis.call('PUBLISH', channel, kind .. ' ' .. p.e .. ' ' .. p.t .. ' ' .. prev .. ' ' .. nowText .. ' ' ..
    cause .. ' ' .. conn .. ' ' .. record)
end

-- How long an empty room's position is remembered.
local KEEP = 3600000

-- remove ends an entry that is known to be there.
-- k: its keys {members, seq, conn, state, owned, rooms}
local function remove(k, room, conn, r, epoch, tag, cause, channel)
  local p, prev = advance(k.seq, epoch, tag, r.inc, -1)
  if not p then
    return prev
  end
  redis.call('HDEL', k.members, conn)
  if r.ttl ~= '0' or r.state ~= '' then
    redis.call('DEL', k.conn, k.state)
  end
  index(k.owned, 'e ' .. conn .. ' ' .. r.entry .. ' ' .. room, false)
  if redis.call('EXISTS', k.members) == 0 then
    index(k.rooms, room, false)
    redis.call('PEXPIRE', k.seq, KEEP)
  end
  r.seq = p.text
  r.mv, r.sv, r.flag, r.til = '0', '0', '.', '0'
  publish(channel, 'L', p, prev, cause, conn, encode(r, '', ''))
  return nil
end

-- setState writes the copy of a state for whoever looks, or takes it away.
local function setState(key, state, left)
  if state == '' then
    redis.call('DEL', key)
  elseif tonumber(left) > 0 then
    redis.call('SET', key, state, 'PX', left)
  else
    redis.call('SET', key, state)
  end
end

-- dropState ends the state of a present entry and tells so.
local function dropState(k, conn, r, version, epoch, tag, channel)
  local p, prev = advance(k.seq, epoch, tag, nil, 0)
  if not p then
    return prev
  end
  r.seq = p.text
  r.sv, r.flag, r.til, r.state = version, '.', '0', ''
  redis.call('HSET', k.members, conn, encode(r, r.meta, ''))
  redis.call('DEL', k.state)
  publish(channel, 'S', p, prev, '.', conn, encode(r, '', ''))
  return nil
end
