-- commit.lua: a batch of changes of one owner.
--
-- KEYS[1] fence of the incarnation   KEYS[2] its owned index   KEYS[3] rooms index of the bucket,
--   then seq of each room in the order of their R, then the keys of the ops
-- ARGV[1] incarnation  ARGV[2] number of the batch
-- ARGV[3] random tag of the batch, also the epoch of rooms that have none
-- ARGV[4] prefix of event channels
-- ARGV[5] number of the newest batch known to have run here; '0': none; 'i': none, and KEYS[4]
--   is the list of live servers, which must contain the incarnation
-- ARGV[6] number of rooms
--
-- Then the ops. Each begins with a name. The name begins with the kind of the op and is
-- unique in the batch (except for R and T); the tag of the batch and the name together
-- are the tag of the write. The arguments and keys of each kind (a test compares this
-- list with the code on both sides):
--
--   R | room tracked | members | begins the ops of a room, once per room; tracked '1': the caller has a rule for it
--   J | conn entry attributes meta | | join without TTL and state
--   j | conn entry attributes meta left state stateLeft | conn state | join; stateLeft '': an earlier copy may exist
--   S | conn entry ttl left stateVersion stateAttributes stateLeft state | conn state | newer state
--   M | conn entry ttl left metaVersion metaAttributes meta | conn state | newer metadata
--   U | conn entry ttl left stateVersion stateAttributes stateLeft state metaVersion metaAttributes meta | conn state | both
--   L | conn entry known | | leave; the last letter of the name is the cause; known '1': Redis has acknowledged the entry
--   l | conn entry known | conn state | leave of an entry that may have keys of its own
--   C | entries | | number of entries of this incarnation in the room
--   N | | | nothing: the batch itself restores the fence
--   T | conn entry left | members conn | refresh; the name is T and the TTL
--   K | conn metaVersion meta fresh | connection-meta | registration; fresh '1': the first by this incarnation
--   D | conn | connection-meta | end of a registration
--
-- J, j, S, M, U, L, l and C are about the room of the last R. Attributes are
-- 'stateLength stateVersion flag ' and 'metaVersion metaLength '. Those of a join are
-- the TTL and both.
--
-- Reply: 'FENCED', 'LATE' or 'LOST' for the whole batch, otherwise per op except R
--   a number and a string if it published something: members of the room (J and j only) and
--     'epoch seq tag' ('' to J and j if the position of the room was lost);
--   or one string: '+' done without an event, '+ version meta' (K: Redis holds newer metadata),
--     '0' no such entry, 'x' another entry ('x incarnation' to S, M, U, T: its owner),
--     '! text' refused by Redis, nothing changed,
--     'k' nothing changed, the entry has keys of its own and the op must name them (j, l)

local inc, number, batch, channels = args[1], args[2], args[3], args[4]

-- A batch that waited in a proxy while a later one ran is dropped as a whole, because
-- its changes were decided again since. The same number again is a retry.
local last = call('GET', keys[1])
if last == 'dead' or last == 'gone' then
  return 'FENCED'
end
if last and tonumber(last) > tonumber(number) then
  return 'LATE'
end
-- If Redis lost everything including the fence, this may be a batch of a server that
-- died long ago. If Redis lacks a batch that it acknowledged, it has gone back or is an
-- old master, and would lose this batch too.
if args[5] == 'i' then
  if not last and not call('ZSCORE', keys[4], inc) then
    return 'LOST'
  end
elseif tonumber(last or '0') < tonumber(args[5]) then
  return 'LOST'
end

-- If Redis is out of memory, it refuses the first write of a script that may take more
-- memory, and allows all writes after any other write. Leaves must always be possible.
-- Other ops are refused one by one.
local full = failed(try('SET', keys[1], number, 'PX', 86400000))
if full then
  call('PEXPIRE', keys[1], 86400000)
  call('SET', keys[1], number, 'PX', 86400000)
end

local mine = ' ' .. inc .. ' ' -- follows the entry id in a record
-- Changes of the owned index: item -> true to add it, false to remove it. They are
-- written at the end, because an entry may join and leave in one call.
local owned = {}
local ki, ai = 4, 7 -- the next keys and arguments
if args[5] == 'i' then
  ki = 5
end
readPositions(ki, tonumber(args[6]))
ki = ki + tonumber(args[6])

-- The members key of a room in which an op has to be repeated with its keys. Later ops
-- of that room are repeated too, so that their order is kept.
local waits

local function again()
  waits = members
  return 'k'
end

local function indexed(conn, entry)
  return 'e ' .. conn .. ' ' .. entry .. ' ' .. room
end

local function read(key, conn)
  local v = try('HGET', key, conn)
  if failed(v) then
    return nil, '! ' .. v.err
  end
  if not v then
    return nil, '0'
  end
  return v
end

-- deadline returns the time at which a state with this life ends; '0': never.
local function deadline(left)
  return (left == '0' or left == '') and '0' or string.format('%.0f', now + tonumber(left))
end

-- setState writes or deletes the copy of a state that is for inspection.
local function setState(key, state, left)
  if state == '' then
    call('DEL', key)
  elseif left ~= '0' then
    call('SET', key, state, 'PX', left)
  else
    call('SET', key, state)
  end
end

-- update writes the newer parts of an existing entry: metadata, state, TTL, and its
-- per-connection key. It returns 0 if it changed the position of the room.
local function update(key, v, mark, conn, entry, ttl, left, mv, metaAttrs, meta, sv, stateAttrs, stateLeft, state, connKey, stateKey)
  local by = mine
  if find(v, entry .. mine, 1, true) ~= 1 then
    local id
    id, by = match(v, '^(%S+)( %S+ )')
    if id ~= entry then
      -- Another entry of the same incarnation is an older one of this connection, which
      -- a late batch brought back after Redis lost the numbers. It has to be replaced.
      -- If it counted as another server's, the connection would lose its place.
      return not id and '! ' .. ODD or by == mine and '0' or 'x' .. sub(by, 1, -2)
    end
  end
  local from = #entry + #by + 1
  local _, stop, ttl0, state1, sl, sv0, meta1, mv0, ml, til, joined, s = find(v, REST, from)
  if not stop then
    return '! ' .. ODD
  end
  local metaNew = tonumber(mv) > tonumber(mv0)
  local stateNew = tonumber(sv) > tonumber(sv0)
  local told = '+'
  local who = entry .. by .. ttl .. ' '
  if metaNew or stateNew then
    local err = stand(batch)
    if err then
      return '! ' .. err
    end
    local cut = stop + tonumber(ml)
    local meta0, state0 = sub(v, stop + 1, cut), sub(v, cut + 1)
    local record
    if metaNew then
      advance(mark)
      told, s, meta0, mv0, meta1 = 0, seq, meta, mv, metaAttrs
      record = who .. state1 .. meta1 .. til .. ' ' .. joined .. ' ' .. s .. '\n' .. meta0 .. state0
      publish('M', '.', conn, record)
    end
    if stateNew then
      local tell = state0 ~= '' or state ~= ''
      if tell then
        advance(mark .. '+')
        told, s, til = 0, seq, deadline(stateLeft)
        setState(stateKey, state, stateLeft)
      end
      local since = til .. ' ' .. joined .. ' ' .. s .. '\n'
      record = who .. stateAttrs .. meta1 .. since .. meta0 .. state
      if tell then
        publish('S', '.', conn, meta0 == '' and record or who .. stateAttrs .. mv0 .. ' 0 ' .. since .. state)
      end
    end
    call('HSET', key, conn, record)
  elseif ttl ~= ttl0 then
    call('HSET', key, conn, who .. sub(v, from + #ttl0 + 1))
  end
  if state ~= '' and sv == sv0 and sv ~= '0' and call('EXISTS', stateKey) == 0 then
    setState(stateKey, state, stateLeft) -- the copy was lost
  end
  if ttl == '0' then
    if left ~= '0' or ttl0 ~= '0' then
      call('DEL', connKey)
    end
  elseif left ~= '0' then
    call('SET', connKey, entry, 'PX', left)
  end
  return told
end

-- modify executes S, M and U.
local function modify(mark, conn, entry, ttl, left, mv, metaAttrs, meta, sv, stateAttrs, stateLeft, state)
  if waits == members then
    return 'k'
  end
  local v, out = read(members, conn)
  if not v then
    return out
  end
  local more
  if full then
    -- A refresh needs no additional memory. If it were refused, every entry with a TTL
    -- would expire. Only the rest of the op is refused, if it is newer than the record.
    -- An entry that is only verified brings nothing new.
    local sv0, mv0 = match(v, '^%S+ %S+ %d+ %d+ (%d+) %S (%d+) ')
    more = sv0 and (tonumber(mv) > tonumber(mv0) or tonumber(sv) > tonumber(sv0))
    mv, sv = '0', '0'
  end
  out = update(members, v, mark, conn, entry, ttl, left, mv, metaAttrs, meta, sv, stateAttrs, stateLeft, state,
    keys[ki], keys[ki + 1])
  if more and out == '+' then
    return '! ' .. full
  end
  return out
end

local function refresh(name, key, conn, entry, left)
  if waits == key then
    return 'k'
  end
  local v, out = read(key, conn)
  if not v then
    return out
  end
  local ttl = sub(name, 2)
  if ttl ~= '0' and find(v, entry .. mine .. ttl .. ' ', 1, true) == 1 then
    if call('PEXPIRE', keys[ki + 1], left) == 0 then
      call('SET', keys[ki + 1], entry, 'PX', left)
    end
    return '+'
  end
  return update(key, v, '', conn, entry, ttl, left, '0', '', '', '0', '', '0', '', keys[ki + 1])
end

-- rejoin is a join of a connection that has an entry.
local function rejoin(mark, conn, entry, attrs, meta, left, state, stateLeft, connKey, stateKey)
  local v, out = read(members, conn)
  if not v then
    return out
  end
  local id, by, joined = match(v, '^(%S+)( %S+ )%d+ %d+ %d+ %S %d+ %d+ %d+ (%d+) %d+\n')
  if not id then
    return '! ' .. ODD
  end
  local ttl, stateAttrs, sv, metaAttrs, mv = match(attrs, '^(%d+) (%d+ (%d+) %S )((%d+) %d+ )')
  if id == entry then
    -- The join has run before, and its reply was lost. A repetition of the same batch
    -- changes nothing. A batch that was made again may contain a newer state, metadata
    -- or TTL, which its owner takes for written.
    out = update(members, v, mark, conn, entry, ttl, left, mv, metaAttrs, meta, sv, stateAttrs, stateLeft, state,
      connKey, stateKey)
    if out ~= 0 and out ~= '+' then
      return out
    end
    owned[indexed(conn, entry)] = true
    return sized(0)
  end
  owned[indexed(conn, entry)] = true
  if by == mine then
    owned[indexed(conn, id)] = false
  else
    count(by, -1)
    count(mine, 1)
  end
  advance(mark)
  local record = entry .. mine .. attrs .. deadline(stateLeft) .. ' ' .. joined .. ' ' .. seq .. '\n' .. meta .. state
  call('HSET', members, conn, record)
  if ttl ~= '0' then
    call('SET', connKey, entry, 'PX', left)
  else
    call('DEL', connKey)
  end
  setState(stateKey, state, stateLeft)
  publish('R', '.', conn, record)
  return sized(0)
end

local function join(mark, conn, entry, attrs, meta, left, state, stateLeft, connKey, stateKey)
  if full then
    return '! ' .. full
  end
  if waits == members then
    return 'k'
  end
  local err = stand(batch)
  if err then
    return '! ' .. err
  end
  local next = following()
  local record = entry .. mine .. attrs .. deadline(stateLeft) .. ' ' .. nowText .. ' ' .. next .. '\n' .. meta .. state
  -- HSETNX tests and writes in one call.
  local new = try('HSETNX', members, conn, record)
  if new == 0 then
    if not connKey then
      return again()
    end
    return rejoin(mark, conn, entry, attrs, meta, left, state, stateLeft, connKey, stateKey)
  end
  if failed(new) then
    return '! ' .. new.err
  end
  advance(mark, next)
  owned[indexed(conn, entry)] = true
  sized(1)
  if bereft(batch) then
    record = entry .. mine .. attrs .. deadline(stateLeft) .. ' ' .. nowText .. ' 1\n' .. meta .. state
    call('HSET', members, conn, record)
    advance(mark, '1')
  end
  count(mine, 1)
  if connKey then
    if left ~= '0' then
      call('SET', connKey, entry, 'PX', left)
    end
    if state ~= '' then
      setState(stateKey, state, stateLeft)
    elseif stateLeft == '' then
      call('DEL', stateKey) -- of an entry whose record is lost
    end
  end
  publish('J', '.', conn, record)
  return size
end

-- ended reports whether an entry without a record, which Redis has held, was ended by
-- this batch or by another server: then its end was published, and it was counted and
-- removed from the index. Otherwise its record is lost, and mirrors still list it.
local function ended(name)
  return owned[name] == false or
    placed and not overcounted(mine) and call('SMISMEMBER', keys[2], name)[1] == 0
end

-- leave ends an entry. known is '1' if Redis has acknowledged the entry.
local function leave(mark, conn, entry, known, connKey, stateKey)
  if waits == members then
    return 'k'
  end
  local v, out = read(members, conn)
  if not v and out ~= '0' then
    return out
  end
  local by = mine
  if v and find(v, entry .. mine, 1, true) ~= 1 then
    local id
    id, by = match(v, '^(%S+)( %S+ )')
    if not id then
      return '! ' .. ODD
    end
    if id ~= entry then
      v, out = nil, 'x'
    end
  end
  if not v then
    local name = indexed(conn, entry)
    if out == '0' and known == '1' and not stand(batch) and not ended(name) then
      farewell(conn, entry, mine, mark, sub(mark, -1))
    end
    owned[name] = false
    if out == '0' and connKey then
      call('DEL', connKey, stateKey)
    end
    return out
  end
  local from = #entry + #by + 1
  if sub(v, from, from + 3) == '0 0 ' then
    connKey = nil -- neither TTL nor state
  elseif not connKey then
    return again()
  end
  local err = stand(batch)
  if err then
    return '! ' .. err
  end
  remove(conn, entry, by, connKey, stateKey, mark, sub(mark, -1))
  owned[indexed(conn, entry)] = false
  return 0
end

local function connect(key, conn, version, meta, fresh)
  if full then
    return '! ' .. full
  end
  local h = try('HMGET', key, 'v', 'd', 'o')
  if h.err then
    return '! ' .. h.err
  end
  local w, out
  if fresh == '1' and h[1] and h[3] ~= inc then
    -- A connection with this id on another server left these. They are not the metadata
    -- of this connection, regardless of the version.
    local v = (tonumber(h[1]) + 1) .. ''
    w = try('HSET', key, 'o', inc, 'v', v, 'd', meta)
    out = '+ ' .. v .. ' ' .. meta
  elseif h[1] and tonumber(h[1]) > tonumber(version) then
    w = try('HSET', key, 'o', inc)
    out = '+ ' .. h[1] .. ' ' .. (h[2] or '')
  else
    w = try('HSET', key, 'o', inc, 'v', version, 'd', meta)
    out = '+'
  end
  if failed(w) then
    return '! ' .. w.err
  end
  owned['c ' .. conn] = true
  return out
end

local function disconnect(key, conn)
  local o = try('HGET', key, 'o')
  if failed(o) then
    return '! ' .. o.err
  end
  owned['c ' .. conn] = false
  if o == inc then
    call('DEL', key)
  end
  return '+'
end

-- recount sets the number of entries of this incarnation in the current room, and adds
-- the room to the index of rooms. It restores a lost position. It leaves an empty room
-- as it is. It also leaves a count that the records do not reach: then some were lost,
-- and only the count shows it.
local function recount(n)
  local err = stand(batch)
  if err then
    return '! ' .. err
  end
  local total = try('HLEN', members)
  if failed(total) then
    return '! ' .. total.err
  end
  if sized(0) == 0 then
    return '0'
  end
  filled[#filled + 1] = room
  count(mine, 0)
  if entries == n and position ~= '' then
    return '+'
  end
  if counted() + n > size then
    return '0'
  end
  entries, moved = n, true
  position = epoch .. ' ' .. seq .. ' ' .. tag
  return '+'
end

-- perform executes the current op. It returns the answer and the number of arguments
-- and keys of the op.
local function perform(name)
  local kind = sub(name, 1, 1)
  local a, b, c, d = args[ai + 1], args[ai + 2], args[ai + 3], args[ai + 4]
  if kind == 'R' then
    enter(a, b, keys[ki], channels)
    return nil, 2, 1
  elseif kind == 'J' then
    return join(batch .. name, a, b, c, d, '0', '', '0'), 4, 0
  elseif kind == 'L' then
    return leave(batch .. name, a, b, c), 3, 0
  elseif kind == 'T' then
    return refresh(name, keys[ki], a, b, c), 3, 2
  elseif kind == 'S' then
    return modify(batch .. name, a, b, c, d, '0', '', '', args[ai + 5], args[ai + 6], args[ai + 7], args[ai + 8]), 8, 2
  elseif kind == 'M' then
    return modify(batch .. name, a, b, c, d, args[ai + 5], args[ai + 6], args[ai + 7], '0', '', '0', ''), 7, 2
  elseif kind == 'U' then
    return modify(batch .. name, a, b, c, d, args[ai + 9], args[ai + 10], args[ai + 11], args[ai + 5], args[ai + 6], args[ai + 7],
      args[ai + 8]), 11, 2
  elseif kind == 'j' then
    return join(batch .. name, a, b, c, d, args[ai + 5], args[ai + 6], args[ai + 7], keys[ki], keys[ki + 1]), 7, 2
  elseif kind == 'l' then
    return leave(batch .. name, a, b, c, keys[ki], keys[ki + 1]), 3, 2
  elseif kind == 'C' then
    return recount(tonumber(a)), 1, 0
  elseif kind == 'N' then
    return '+', 0, 0
  elseif kind == 'K' then
    return connect(keys[ki], a, b, c, d), 4, 1
  end
  return disconnect(keys[ki], a), 1, 1
end

local reply, answers = {}, 0

local function performAll()
  local size = #args
  while ai <= size do
    local out, used, touched = perform(args[ai])
    if out then
      answers = answers + 1
      reply[answers] = out
      if type(out) == 'number' then
        answers = answers + 1
        reply[answers] = position or ''
      end
    end
    ai, ki = ai + 1 + used, ki + touched
  end
end

local stopped = attempt(performAll, keys[3])
local come, go = {}, {}
for name, there in pairs(owned) do
  if there then
    come[#come + 1] = name
  else
    go[#go + 1] = name
  end
end
spread('SADD', keys[2], come)
spread('SREM', keys[2], go)
return stopped or reply
