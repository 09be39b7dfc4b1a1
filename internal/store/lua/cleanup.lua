-- cleanup.lua: ends entries and states of other owners, each only on its ground. The
-- record is the claim: the call that removes it publishes the end, and all others find
-- it gone.
--
-- KEYS[1] rooms index of the bucket, then seq of each room in the order of their R or N, then
--   members (R), members, users, kept and recount (N), owned and fence (I), conn and state (items)
-- ARGV[1] random tag of the call, also the epoch of rooms that have none
-- ARGV[2] prefix of event channels
-- ARGV[3] expected time of this Redis (unix ms)  ARGV[4] tolerance (ms)
-- ARGV[5] number of rooms
--   then R or N (if the room may be numbered), a room and '1' if the caller has a rule for it,
--   once per room, followed by the items of the room: name conn entry stateVersion
--   I begins the items of another owner. It is followed by the time from which grace counts, '0': now.
--   A name is unique in the call and begins with the ground:
--     t: the per-connection key is gone   s: the key of the state is gone   d: the owner is fenced
--     g: the time of a kept place is over   r: the app removes a kept place
--
-- Reply: 'CLOCK', or per item '+' ended now, 'k until' its place is kept, 'a' the ground does not hold,
--   'a until' (g) its time is not over, '0' ended before, 'n' nothing changed, the item must be repeated
--   with N, '! text' refused

local batch, channels = args[1], args[2]
stem = batch
if math.abs(now - tonumber(args[3])) > tonumber(args[4]) then
  return 'CLOCK'
end

-- If Redis is out of memory it refuses only the first write of a script that may take
-- more. SREM takes none, so after it all writes are allowed: ends are always possible.
try('SREM', keys[1], '')

-- The current owner.
local ownedKey, fenceKey, owner
local since -- time in ms from which grace counts, nil: now
local fenced -- nil: not read yet
local gone = {} -- items to remove from its index

local function unlist(conn, entry)
  gone[#gone + 1] = placeOf(conn, entry)
end

local function leaveIndex()
  spread('SREM', ownedKey, gone)
  gone = {}
end

local function dead()
  if fenced == nil then
    local fence = call('GET', fenceKey)
    fenced = fence == 'dead' or fence == 'gone'
  end
  return fenced
end

-- mourn ends an entry of the dead owner that is in its index and has no record. Removing
-- it from the index is the claim.
local function mourn(name, conn, entry, connKey, stateKey)
  local item = placeOf(conn, entry)
  if call('SREM', ownedKey, item) == 0 then
    return '0'
  end
  local err = stand(batch)
  if err or users ~= nil and not usersKey then
    call('SADD', ownedKey, item)
    return err and '! ' .. err or 'n'
  end
  call('DEL', connKey, stateKey)
  farewell(conn, entry, owner, batch .. name, 'd')
  return '+'
end

-- endState ends the state of an entry, whose record v has these fields.
local function endState(mark, conn, entry, inc, v, stop, ttl, sv, meta, mv, ml, joined, tail, stateKey)
  local user, _, extra, cut = person(v, stop, tail)
  advance(mark)
  local who = entry .. inc .. ttl .. ' 0 ' .. sv .. ' . '
  local after = '0 ' .. joined .. ' ' .. seq .. tail .. '\n' .. user .. extra
  call('HSET', members, conn, who .. meta .. after .. sub(v, cut + 1, cut + tonumber(ml)))
  call('DEL', stateKey)
  publish('S', '.' .. figures(user), conn, who .. mv .. ' 0 ' .. after)
  return '+'
end

-- judgePlace ends a kept place of the current room. v is the record of its connection.
local function judgePlace(name, conn, entry, v, id, inc)
  local mode = sub(name, 1, 1)
  if not keptKey then
    return 'n'
  end
  local item = placeOf(conn, entry)
  if id ~= entry or inc ~= KEPT then
    local err = stand(batch)
    if err then
      return '! ' .. err
    end
    local listed = try('ZREM', keptKey, item)
    if id == entry then
      return 'a' -- its connection is back
    end
    if v or listed ~= 1 then
      return '0'
    end
    farewell(conn, entry, KEPT, batch .. name, 'b') -- its record was lost
    return '+'
  end
  local _, stop, _, _, _, _, _, _, _, _, _, _, tail = find(v, REST, #entry + #inc + 1)
  if not stop then
    return '! ' .. ODD
  end
  local user, _, _, _, till, cause = person(v, stop, tail)
  if not till then
    till, cause = '0', 'b'
  end
  if mode == 'r' then
    cause = 'r'
  elseif tonumber(till) > now then
    try('ZADD', keptKey, till, item) -- it may have been lost
    return 'a ' .. till
  end
  local err = stand(batch)
  if err then
    return '! ' .. err
  end
  lacksKeys(true, user)
  if call('HGET', members, conn) ~= v then
    return '0' -- its user has others, as a recount found
  end
  remove(conn, entry, inc, nil, nil, batch .. name, cause, user)
  return '+'
end

-- judge ends an entry of the current room, or its state. An unknown ground is refused.
local function judge(name, conn, entry, version, connKey, stateKey)
  local mode, cause = sub(name, 1, 1), nil
  if not find('tsdgr', mode, 1, true) then
    return '! WRONGFORMAT unknown ground'
  end
  local v = try('HGET', members, conn)
  if failed(v) then
    return '! ' .. v.err
  end
  local id, inc
  if v then
    id, inc = match(v, '^(%S+)( %S+ )')
  end
  if mode == 'g' or mode == 'r' then
    return judgePlace(name, conn, entry, v, id, inc)
  end
  if id ~= entry then
    if not v and mode == 'd' and dead() then
      return mourn(name, conn, entry, connKey, stateKey)
    end
    unlist(conn, entry)
    return '0'
  end
  local _, stop, ttl, _, sl, sv, meta, mv, ml, til, joined, _, tail = find(v, REST, #entry + #inc + 1)
  if not stop then
    return '! ' .. ODD
  end
  if mode == 's' then
    if sl == '0' or sv ~= version then
      return '0'
    end
    if til == '0' or call('EXISTS', stateKey) == 1 then
      return 'a'
    end
  elseif mode == 't' then
    if ttl == '0' or call('EXISTS', connKey) == 1 then
      return 'a'
    end
    cause = 's'
  else
    if not dead() then
      return 'a'
    end
    if inc == KEPT then -- another server has found it before
      unlist(conn, entry)
      local _, _, _, _, till = person(v, stop, tail)
      return 'k ' .. (till or '0')
    end
    cause = 'd'
  end
  local err = stand(batch)
  if err then
    return '! ' .. err
  end
  local user, grace = person(v, stop, tail)
  if lacksKeys(user ~= '' or cause and grace ~= '0', user) then
    return 'n'
  end
  if mode == 's' then
    return endState(batch .. name, conn, entry, inc, v, stop, ttl, sv, meta, mv, ml, joined, tail, stateKey)
  end
  if ttl == '0' and sl == '0' then
    connKey = nil -- it has no keys of its own
  end
  unlist(conn, entry)
  local till = keptUntil(conn, user, grace, true, since)
  if till and handOver(conn, entry, inc, v, stop, till, cause, batch .. name, connKey, stateKey) then
    return 'k ' .. till
  end
  remove(conn, entry, inc, connKey, stateKey, batch .. name, cause, user)
  return '+'
end

local total = tonumber(args[5])
readPositions(2, total)
local reply = {}

local function judgeAll()
  local ki, ai = 2 + total, 6
  while ai <= #args do
    local kind = args[ai]
    if kind == 'R' then
      enter(args[ai + 1], args[ai + 2], channels, keys[ki])
      ki, ai = ki + 1, ai + 3
    elseif kind == 'N' then
      enter(args[ai + 1], args[ai + 2], channels, keys[ki], keys[ki + 1], keys[ki + 2], keys[ki + 3])
      ki, ai = ki + 4, ai + 3
    elseif kind == 'I' then
      leaveIndex()
      ownedKey, fenceKey, fenced, since = keys[ki], keys[ki + 1], nil, tonumber(args[ai + 1])
      owner = ' ' .. (match(ownedKey, '[^:]+$') or '') .. ' '
      if since == 0 then
        since = nil
      end
      ki, ai = ki + 2, ai + 2
    else
      reply[#reply + 1] = judge(kind, args[ai + 1], args[ai + 2], args[ai + 3], keys[ki], keys[ki + 1])
      ki, ai = ki + 2, ai + 4
    end
  end
end

local stopped = attempt(judgeAll, keys[1])
leaveIndex()
return stopped or reply
